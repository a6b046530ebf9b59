"""Compiles the Triton kernels without a GPU, and inspects the machine code.

``inspect()`` yields one ``Record`` a kernel, configuration and target: registers, spills, shared
memory and 16-byte loads, counted by the tools that come with Triton, and a lower bound of the time
on an H100. ``python -m`` this module prints JSON.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from npo_fast.kernels.triton.config import TARGETS, h100_floor_ms
from npo_fast.kernels.triton.variants import Variant, variants


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, its shared memory, and what its 16-byte loads look like."""

    gpu: GPUTarget
    shared_limit_bytes: int
    wide_load: str  # 16 bytes a lane, or a bulk copy


_NVIDIA_LOAD = r"LDG\.E\S*\.128|LDGSTS\S*\.128|UTMALDG"
TARGETS_OFFLINE = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10, _NVIDIA_LOAD),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10, _NVIDIA_LOAD),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10, _NVIDIA_LOAD),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, r"(?:global|buffer)_load_dwordx4"),
}

# by the name of a kernel's argument; other arguments are 32-bit integers that 16 divides
TYPES = {
    **dict.fromkeys("logits ref_logits hidden weight bias gradient".split(), "*bf16"),
    **dict.fromkeys(
        "log_probs lses ref_log_probs sequence_log_probs values weights g kls peaks totals "
        "ref_peaks ref_totals peak_out total_out targets shifts shares factor out".split(),
        "*fp32",
    ),
    **dict.fromkeys("softcap logit_scale ref_softcap ref_logit_scale beta".split(), "fp32"),
    "labels": "*i64",
    "cu_seqlens": "*i32",
}
UNIT_STRIDES = ("row_stride", "ref_row_stride")  # in the layout of ``empty_logits``
# sizes of the problem, as odd as they come: GPT-2 has 50257 tokens, a batch any number of rows
NOT_DIVISIBLE = ("rows", "columns", "slices")


@dataclass(frozen=True)
class Record:
    """One compiled kernel."""

    kernel: str
    variant: str
    dtype: str
    target: str
    config: str
    registers: int
    spill_bytes: int  # NVIDIA: stack; AMD: private segment and spilled registers
    shared_bytes: int
    shared_limit_bytes: int
    wide_loads: int  # 16-byte load instructions
    h100_floor_ms: float | None  # to move the bytes; None where there are next to none


def inspect(targets: Iterable[str] = TARGETS) -> Iterator[Record]:
    """Compiles every shipped variant for ``targets``, one after another."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("offline compilation needs a process without TRITON_INTERPRET")
    for target in targets:
        for variant in variants(target):
            yield _record(variant)


def table(records: Iterable[Record]) -> list[dict[str, str | int | float]]:
    """Returns one row a record, with units in the column names."""
    return [
        {
            "kernel": f"{record.kernel} ({record.variant}, {record.dtype})",
            "target": record.target,
            "config": record.config,
            "registers": record.registers,
            "spill_bytes": record.spill_bytes,
            "shared_kib": round(record.shared_bytes / 1024, 1),
            "shared_limit_kib": record.shared_limit_bytes // 1024,
            "loads_16_bytes": record.wide_loads,
            "h100_floor_ms": "" if record.h100_floor_ms is None else round(record.h100_floor_ms, 3),
        }
        for record in records
    ]


def _record(variant: Variant) -> Record:
    target = TARGETS_OFFLINE[variant.target]
    options = {**variant.options, "enable_fp_fusion": True}
    compiled = triton.compile(_source(variant), target=target.gpu, options=options)
    cuda = target.gpu.backend == "cuda"
    code_of = _read_cubin if cuda else _read_amdgcn
    registers, spill_bytes, code = code_of(compiled.asm["cubin" if cuda else "amdgcn"])
    identity = variant.kernel, variant.name, variant.dtype, variant.target, variant.config
    shared = compiled.metadata.shared, target.shared_limit_bytes
    wide_loads = len(re.findall(target.wide_load, code))
    floor = h100_floor_ms(0.0, variant.moved_bytes) if variant.moved_bytes else None
    return Record(*identity, registers, spill_bytes, *shared, wide_loads, floor)


def _source(variant: Variant) -> ASTSource:
    """The kernel with the argument types and alignment of a launch at ordinary sizes."""
    hip = TARGETS_OFFLINE[variant.target].gpu.backend == "hip"
    names = variant.function.arg_names
    constants = {**variant.constants, **{name: 1 for name in UNIT_STRIDES if name in names}}
    signature, attributes = {}, {}
    for at, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = TYPES.get(name, "i32").replace("bf16", variant.dtype)
        signature[name] = kind
        pointer = kind.startswith("*")
        if (pointer or kind == "i32") and name not in NOT_DIVISIBLE:
            attributes[(at,)] = [["tt.divisibility", 16]]
            if pointer and hip:  # tensors below 2 GiB: lets AMD use buffer instructions
                attributes[(at,)].append(["tt.pointer_range", 32])
    return ASTSource(variant.function, signature, constants, attributes)


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack and the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        code = _run(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    return int(match[1]), int(match[2]), code


def _read_amdgcn(assembly: str) -> tuple[int, int, str]:
    """Vector registers, bytes of private memory with spilled registers, and the assembly."""

    def metadata(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert match is not None, key
        return int(match[1])

    spilled = 4 * (metadata("vgpr_spill_count") + metadata("sgpr_spill_count"))
    return metadata("vgpr_count"), metadata("private_segment_fixed_size") + spilled, assembly


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    print(json.dumps([asdict(record) for record in inspect()], indent=1))
