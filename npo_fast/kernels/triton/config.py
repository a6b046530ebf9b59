"""Every tuned number of the Triton kernels, a target: the one place to change them.

Defaults are fixed, so that two runs on one GPU model agree. ``offline`` compiles all of them and
the tests hold them to no spills and to the shared memory of the target.
"""

from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class RowConfig:
    """How one program takes a row of logits."""

    block: int  # columns a step of a row that is longer than on_chip_columns
    on_chip_columns: int  # rows up to here stay in registers between their two passes
    columns_per_warp: int
    max_warps: int

    def warps(self, block: int) -> int:
        return min(self.max_warps, max(1, block // self.columns_per_warp))


# 1024 threads with 32 fp32 columns each are what 64 registers a thread hold without spilling;
# 16 columns a thread a step (two 16-byte loads of bf16) keep enough bytes in flight
_NVIDIA_ROW = RowConfig(block=8192, on_chip_columns=32768, columns_per_warp=512, max_warps=32)
_AMD_ROW = RowConfig(block=8192, on_chip_columns=32768, columns_per_warp=1024, max_warps=16)

ROW = MappingProxyType(
    {"sm_80": _NVIDIA_ROW, "sm_90": _NVIDIA_ROW, "sm_100": _NVIDIA_ROW, "gfx942": _AMD_ROW}
)


def row_config() -> RowConfig:
    return ROW[current_target()]


@cache
def current_target() -> str:
    """The entry of ``TARGETS`` whose configurations fit the present GPU."""
    import triton

    if triton.knobs.runtime.interpret:
        return "sm_80"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    # consumer Blackwell (sm_12x) has neither tcgen05 nor more shared memory than sm_86
    return {9: "sm_90", 10: "sm_100"}.get(target.arch // 10, "sm_80")
