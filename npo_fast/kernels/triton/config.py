"""What is known of each target, and every tuned number of the Triton kernels: the one place.

Defaults are fixed, so that two runs on one GPU model agree. ``offline`` compiles all of them and
the tests hold them to no spills and to the shared memory of the target.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
H100_FLOPS = 990e12  # dense bf16
H100_BYTES_PER_S = 3.35e12


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
    """The tile of logits that a program of the row kernels takes at a time."""

    block_rows: int  # neighbours in memory
    block_columns: int
    num_warps: int
    kl_num_warps: int  # for two tiles side by side
    programs: int  # a processor, which then has something to do while others wait for memory


# 32 logits a thread: four 16-byte loads of bf16 in flight. The best of 15 on an H200
_ROW = RowConfig(block_rows=128, block_columns=32, num_warps=4, kl_num_warps=8, programs=8)
ROW = MappingProxyType(dict.fromkeys(TARGETS, _ROW))

# fp32 operands multiply without tensor cores: any small tile does
FP32_TILE = TileConfig(64, 64, 16, num_warps=4, num_stages=2)

_T = TileConfig
_SM80 = _T(128, 128, 64, 8, 3)  # below the 99 KiB that the consumer siblings sm_86 and sm_89 have
_SM90_WIDE, _SM90_SQUARE = _T(128, 256, 64, 8, 3), _T(128, 128, 64, 8, 4)
_SM100 = _T(128, 128, 64, 8, 4)  # 128x256 spills here, as it does on sm_80
_GFX942 = _T(128, 128, 64, 8, 2)

# The first of each is the default, the others are what ``benchmarks/gpu.py`` times beside it.
TILES: Mapping[str, Mapping[str, tuple[TileConfig, ...]]] = MappingProxyType(
    {
        "sm_80": {
            "linear_forward": (_SM80,),
            "logits_gradient": (_SM80,),
            "hidden_gradient": (_SM80,),
            "weight_gradient": (_SM80,),
        },
        "sm_90": {
            "linear_forward": (_SM90_WIDE, _SM90_SQUARE),
            "logits_gradient": (_SM90_WIDE, _SM90_SQUARE),
            # its fp32 sums pass through shared memory, which spills a little at block_k 64
            "hidden_gradient": (_T(128, 256, 32, 8, 4), _SM90_SQUARE),
            "weight_gradient": (_SM90_WIDE, _SM90_SQUARE),
        },
        "sm_100": {
            "linear_forward": (_SM100,),
            "logits_gradient": (_SM100,),
            "hidden_gradient": (_SM100,),
            "weight_gradient": (_SM100,),
        },
        "gfx942": {
            "linear_forward": (_GFX942,),
            "logits_gradient": (_GFX942,),
            "hidden_gradient": (_GFX942,),
            "weight_gradient": (_GFX942,),
        },
    }
)

# tanh takes registers that these tiles do not have left
CAPPED_TILES: Mapping[tuple[str, str], TileConfig] = MappingProxyType(
    {
        ("sm_90", "linear_forward"): _SM90_SQUARE,
        ("sm_90", "logits_gradient"): _SM90_SQUARE,
        ("sm_100", "linear_forward"): _T(128, 64, 64, 8, 4),
    }
)

GROUP = 16  # row blocks that walk over the columns together: 16 MiB of hidden at D=4096, in L2


def h100_floor_ms(flops: float, moved_bytes: float) -> float:
    """The larger of the time to compute and the time to move the bytes."""
    return 1e3 * max(flops / H100_FLOPS, moved_bytes / H100_BYTES_PER_S)


def row_config() -> RowConfig:
    return ROW[current_target()]


def tile_config(kernel: str, dtype: torch.dtype, capped: bool = False) -> TileConfig:
    if dtype == torch.float32:
        return FP32_TILE
    target = current_target()
    if capped and (target, kernel) in CAPPED_TILES:
        return CAPPED_TILES[target, kernel]
    return TILES[target][kernel][0]


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
