"""Every tuned number of the Triton kernels, a target: the one place to change them.

Defaults are fixed, so that two runs on one GPU model agree. ``offline`` compiles all of them and
the tests hold them to no spills and to the shared memory of the target.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class TileConfig:
    """Tile of a GEMM and how many warps and pipeline stages work on it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        """As the keyword arguments of a kernel launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class RowConfig:
    """How one program takes a row of logits."""

    block: int  # columns a step of a row that is longer than on_chip_columns
    on_chip_columns: int  # rows up to here stay in registers between their two passes
    columns_per_warp: int
    max_warps: int

    def warps(self, block: int) -> int:
        return min(self.max_warps, max(1, block // self.columns_per_warp))


# 64 columns a thread stay in registers without spilling (at 1024 threads a thread has too few);
# 16 columns a thread a step (two 16-byte loads of bf16) keep enough bytes in flight
_NVIDIA_ROW = RowConfig(block=8192, on_chip_columns=32768, columns_per_warp=512, max_warps=16)
_AMD_ROW = RowConfig(block=8192, on_chip_columns=32768, columns_per_warp=1024, max_warps=16)

ROW = MappingProxyType(
    {"sm_80": _NVIDIA_ROW, "sm_90": _NVIDIA_ROW, "sm_100": _NVIDIA_ROW, "gfx942": _AMD_ROW}
)

# fp32 operands multiply without tensor cores: any small tile does
FP32_TILE = TileConfig(64, 64, 32, num_warps=4, num_stages=2)

# The first of each is the default, the others are what ``autotune`` tries. sm_80 keeps below the
# 99 KiB of its consumer siblings sm_86 and sm_89. A 128x256 tile spills on sm_80 and sm_100.
_T = TileConfig
TILES: Mapping[str, Mapping[str, tuple[TileConfig, ...]]] = MappingProxyType(
    {
        "sm_80": {
            "linear_forward": (_T(128, 128, 64, 8, 3), _T(128, 128, 32, 8, 4)),
            "logits_gradient": (_T(128, 128, 64, 8, 3), _T(128, 128, 32, 8, 4)),
            "hidden_gradient": (_T(128, 128, 64, 8, 3), _T(128, 128, 32, 8, 4)),
            "weight_gradient": (_T(128, 128, 64, 8, 3), _T(128, 128, 32, 8, 4)),
        },
        "sm_90": {
            "linear_forward": (_T(128, 256, 64, 8, 3), _T(128, 128, 64, 8, 4)),
            "logits_gradient": (_T(128, 256, 64, 8, 3), _T(128, 128, 64, 8, 4)),
            # fp32 sums pass through shared memory, which at block_k 64 costs a few spills
            "hidden_gradient": (_T(128, 256, 32, 8, 4), _T(128, 128, 64, 8, 4)),
            "weight_gradient": (_T(128, 256, 64, 8, 3), _T(128, 128, 64, 8, 4)),
        },
        "sm_100": {
            "linear_forward": (_T(128, 128, 64, 8, 4),),
            "logits_gradient": (_T(128, 128, 64, 8, 4),),
            "hidden_gradient": (_T(128, 128, 64, 8, 4),),
            "weight_gradient": (_T(128, 128, 64, 8, 4),),
        },
        "gfx942": {
            "linear_forward": (_T(128, 128, 64, 8, 2), _T(256, 128, 64, 8, 2)),
            "logits_gradient": (_T(128, 128, 64, 8, 2), _T(256, 128, 64, 8, 2)),
            "hidden_gradient": (_T(128, 128, 64, 8, 2),),
            "weight_gradient": (_T(128, 128, 64, 8, 2),),
        },
    }
)

GROUP = 16  # row blocks that walk over the columns together: 16 MiB of hidden at D=4096, in L2

_tuned: dict[str, TileConfig] = {}


def row_config() -> RowConfig:
    return ROW[current_target()]


def tile_config(kernel: str, dtype: torch.dtype) -> TileConfig:
    if dtype == torch.float32:
        return FP32_TILE
    return _tuned.get(kernel) or TILES[current_target()][kernel][0]


def autotune(kernel: str, launch: Callable[[TileConfig], object]) -> TileConfig:
    """Times every configuration of this GPU and keeps the fastest until the process ends."""
    from triton.testing import do_bench

    candidates = TILES[current_target()][kernel]
    _tuned[kernel] = min(candidates, key=lambda config: do_bench(lambda: launch(config)))
    return _tuned[kernel]


def splits_that_fill(row_blocks: int, processors: int) -> int:
    """Into how many parts to cut the vocabulary so that the last wave of programs is not idle.

    At least so many that one group of row blocks occupies every processor.
    """
    least = max(1, processors // min(row_blocks, GROUP))

    def busy(splits: int) -> float:
        programs = row_blocks * splits
        return programs / (-(-programs // processors) * processors)

    return max(range(least, 2 * least + 1), key=busy)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; one where the interpreter runs."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


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
