"""Every tuned number of the Triton kernels, by target.

Fixed, so that two runs on one GPU model agree. ``offline`` compiles all of them and the tests hold
them to no spills and to the shared memory of the target.
"""

from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import torch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
H100_FLOPS = 990e12  # dense bf16
H100_BYTES_PER_S = 3.35e12


@dataclass(frozen=True)
class RowConfig:
    """The tile of logits that a program of the row kernels takes at a time."""

    block_rows: int  # neighbours in memory
    block_columns: int
    kl_block_columns: int  # of two tiles side by side
    num_warps: int
    programs: int  # a processor, which then has something to do while others wait for memory


# 32 logits a thread: four 16-byte loads of bf16 in flight. The best of 15 on an H200
_NVIDIA_ROW = RowConfig(
    block_rows=128, block_columns=32, kl_block_columns=16, num_warps=4, programs=16
)
# twice the lanes a warp, and no spills
_AMD_ROW = replace(_NVIDIA_ROW, block_columns=16, kl_block_columns=8, num_warps=1)
ROW = MappingProxyType(dict.fromkeys(TARGETS, _NVIDIA_ROW) | {"gfx942": _AMD_ROW})


def h100_floor_ms(flops: float, moved_bytes: float) -> float:
    """Returns the larger of the time to compute and the time to move the bytes, on an H100."""
    return 1e3 * max(flops / H100_FLOPS, moved_bytes / H100_BYTES_PER_S)


def row_config() -> RowConfig:
    """Returns the configuration for the present GPU."""
    return ROW[current_target()]


def processors(device: torch.device) -> int:
    """Returns the streaming multiprocessors or compute units; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def current_target() -> str:
    """Returns the entry of ``TARGETS`` whose configurations fit the present GPU."""
    import triton

    if triton.knobs.runtime.interpret:
        return "sm_80"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    # consumer Blackwell (sm_12x) has neither tcgen05 nor more shared memory than sm_86
    return {9: "sm_90", 10: "sm_100"}.get(target.arch // 10, "sm_80")
