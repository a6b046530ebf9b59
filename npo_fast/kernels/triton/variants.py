"""Every kernel that is shipped, as it is compiled for a target: what ``offline`` looks at.

Costs are those of one step over ``PROBLEM``, each byte counted where a kernel has to move it
between memory and the chip: an operand of a GEMM once a pass over it, the workspace of the
backward pass once a write and once a read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import triton

from npo_fast.kernels.triton import config, npo_head
from npo_fast.kernels.triton.config import TileConfig
from npo_fast.kernels.triton.hidden_gradient import hidden_gradient_kernel
from npo_fast.kernels.triton.linear_backward import LEAST_COLUMNS, WORKSPACE_BYTES
from npo_fast.kernels.triton.linear_forward import linear_forward_kernel
from npo_fast.kernels.triton.logits_gradient import logits_gradient_kernel
from npo_fast.kernels.triton.npo_head import npo_head_kernel
from npo_fast.kernels.triton.row_kl import row_kl_kernel
from npo_fast.kernels.triton.row_log_probs import row_log_probs_kernel
from npo_fast.kernels.triton.weight_gradient import weight_gradient_kernel

N, D, V = PROBLEM = 4096, 4096, 128256  # tokens, width, vocabulary of Llama 3 8B
HALF = 2  # bytes of bf16
CHUNKS = triton.cdiv(V, max(LEAST_COLUMNS, WORKSPACE_BYTES // (N * HALF)))


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time constants and launch options for one target."""

    function: Any  # triton.JITFunction
    name: str  # what the constants switch on
    target: str
    constants: dict[str, Any]
    options: dict[str, int]
    flops: float = 0.0
    moved_bytes: float | None = None  # None: never meets PROBLEM
    dtype: str = "bf16"

    @property
    def kernel(self) -> str:
        return self.function.__name__.removesuffix("_kernel")

    @property
    def is_gemm(self) -> bool:
        return "BLOCK_M" in self.constants

    @property
    def config(self) -> str:
        blocks = [self.constants[k] for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK")
                  if k in self.constants]  # fmt: skip
        launch = " ".join(f"{key.removeprefix('num_')} {n}" for key, n in self.options.items())
        return f"{'x'.join(map(str, blocks))}, {launch}"


def variants(target: str) -> Iterator[Variant]:
    """All of a target, the options of a kernel on its default tile, plain on the others."""
    yield from _row_variants(target)
    constants = {"BLOCK": npo_head.BLOCK}
    yield Variant(npo_head_kernel, "plain", target, constants, {"num_warps": 4}, 0.0, 8.0 * N)
    for kernel, (default, *others) in config.TILES[target].items():
        switched = _SWITCHES[kernel]
        for name, switches in switched.items():
            capped = config.CAPPED_TILES.get((target, kernel)) if "softcap" in name else None
            yield _gemm(kernel, name, target, capped or default, switches)
        for tile in others:
            yield _gemm(kernel, "plain", target, tile, switched["plain"])
        name, switches = list(switched.items())[-1]
        yield _gemm(kernel, name, target, config.FP32_TILE, switches, "fp32")


def _row_variants(target: str) -> Iterator[Variant]:
    row = config.ROW[target]
    passes = {"on chip": 2, "in place": 3, "read only": 1}  # over the logits, in memory
    for name, count in passes.items():
        for capped in (False, True):
            on_chip = name == "on chip"
            block = row.on_chip_columns // (1 + capped) if on_chip else row.block
            constants = {
                "HAS_TARGET": True, "SOFTCAP": capped, "IN_PLACE": name != "read only",
                "ON_CHIP": on_chip, "BLOCK": block,
            }  # fmt: skip
            options = {"num_warps": row.warps(block)}
            label = f"{name}, softcap" if capped else name
            moved = None if on_chip else count * N * V * HALF
            yield Variant(row_log_probs_kernel, label, target, constants, options, 0.0, moved)
    for capped in (False, True):
        constants = {"SOFTCAP": capped, "REF_SOFTCAP": capped, "BLOCK": row.block}
        options = {"num_warps": row.warps(row.block)}
        label = "softcap" if capped else "plain"
        yield Variant(row_kl_kernel, label, target, constants, options, 0.0, 5.0 * N * V * HALF)


_KERNELS = {
    "linear_forward": linear_forward_kernel,
    "logits_gradient": logits_gradient_kernel,
    "hidden_gradient": hidden_gradient_kernel,
    "weight_gradient": weight_gradient_kernel,
}
_SWITCHES = {  # from nothing switched on to everything
    "linear_forward": {
        "plain": {"HAS_BIAS": False, "SOFTCAP": False},
        "bias": {"HAS_BIAS": True, "SOFTCAP": False},
        "softcap, bias": {"HAS_BIAS": True, "SOFTCAP": True},
    },
    "logits_gradient": {
        "plain": {"HAS_BIAS": False, "SOFTCAP": False, "SKIP": False},
        "softcap, bias, skip": {"HAS_BIAS": True, "SOFTCAP": True, "SKIP": True},
    },
    "hidden_gradient": {
        "plain": {"ACCUMULATE": True, "SKIP": False},
        "skip": {"ACCUMULATE": True, "SKIP": True},
    },
    "weight_gradient": {"plain": {"SKIP": False}, "skip": {"SKIP": True}},
}
_MOVED_BYTES = {
    "linear_forward": HALF * (N * D + V * D),
    "logits_gradient": HALF * (CHUNKS * N * D + V * D + N * V),
    "hidden_gradient": HALF * (N * V + V * D) + 8 * CHUNKS * N * D,  # fp32 sums, read and written
    "weight_gradient": HALF * (N * V + CHUNKS * N * D + V * D),
}


def _gemm(
    kernel: str,
    name: str,
    target: str,
    tile: TileConfig,
    switches: Mapping[str, bool],
    dtype: str = "bf16",
) -> Variant:
    constants = {**switches, "EVEN_WIDTH": True, **tile.launch()}
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    if kernel in ("hidden_gradient", "weight_gradient"):
        tiles = config.TILES[target]["logits_gradient"][0] if dtype == "bf16" else tile
        constants.update(KEEP_M=tiles.block_m, KEEP_N=tiles.block_n)
    moved = _MOVED_BYTES[kernel] if dtype == "bf16" else None  # PROBLEM is in bf16
    return Variant(
        _KERNELS[kernel], name, target, constants, options, 2.0 * N * D * V, moved, dtype
    )
