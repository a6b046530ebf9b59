"""Tile kernel: log-probs of labels under a linear head, GEMM and logsumexp in one.

    z_n        = logit_scale * softcap(W h_n + b)
    log_prob_n = z_n[y_n] - logsumexp(z_n)

Not allocated: anything V-wide. A tile of logits lives in registers (tensor memory on sm_100) as
fp32, adds to a running (peak, total) of its rows and is gone; the target logit is picked from the
same fp32 tile, so that a sure token cancels exactly. The vocabulary is split between programs
where the rows alone would leave the GPU idle; (splits, N) partial results meet in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.triton.config import TileConfig, processors, splits_that_fill, tile_config
from npo_fast.kernels.triton.tiles import grouped, logits_tile, rows_inside

# finite, so that the difference of two of them is 0 and not NaN
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def linear_forward_kernel(
    hidden, weight, bias, labels, split_lse, split_target,
    row_count, vocabulary, width, hidden_stride, weight_stride, tiles_per_split,
    softcap, logit_scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, EVEN_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(row_count, BLOCK_M)
    splits = tl.num_programs(0) // row_blocks
    row_block, split = grouped(tl.program_id(0), row_blocks, splits)
    rows = rows_inside(0, row_block, BLOCK_M, row_count)
    label = tl.load(labels + rows).to(tl.int32)
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    target = tl.full((BLOCK_M,), -float("inf"), tl.float32)

    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(vocabulary, BLOCK_N))
    for tile in range(first, last):
        z, _ = logits_tile(
            hidden, weight, bias, rows, rows_inside(0, tile, BLOCK_N, vocabulary), width,
            hidden_stride, weight_stride, softcap, logit_scale,
            HAS_BIAS, SOFTCAP, EVEN_WIDTH, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        z = tl.where(column[None, :] < vocabulary, z, -float("inf"))
        at_label = column[None, :] == label[:, None]
        target = tl.maximum(target, tl.max(tl.where(at_label, z, -float("inf")), axis=1))
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(z - new_peak[:, None]), axis=1)
        peak = new_peak

    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    out = split.to(tl.int64) * row_count + row
    tl.store(split_lse + out, peak + tl.log(total), mask=row < row_count)
    tl.store(split_target + out, target, mask=row < row_count)


def linear_forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D) in the dtype of hidden
    labels: Tensor,  # (N,) in [0, V)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
    *,
    config: TileConfig | None = None,
    splits: int | None = None,  # programs that share a row's vocabulary; None fills the GPU
) -> tuple[Tensor, Tensor]:  # log_probs (N,) fp32, lse (N,) fp32
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    if rows == 0:
        empty = hidden.new_empty(0, dtype=torch.float32)
        return empty, empty.clone()
    assert hidden.stride(1) == weight.stride(1) == 1, (hidden.stride(), weight.stride())
    config = config or tile_config("linear_forward", hidden.dtype, softcap is not None)
    row_blocks = triton.cdiv(rows, config.block_m)
    tiles = triton.cdiv(vocabulary, config.block_n)
    splits = splits or splits_that_fill(row_blocks, processors(hidden.device))
    tiles_per_split = triton.cdiv(tiles, min(tiles, splits))
    splits = triton.cdiv(tiles, tiles_per_split)  # none of them empty
    split_lse = hidden.new_empty(splits, rows, dtype=torch.float32)
    split_target = torch.empty_like(split_lse)
    linear_forward_kernel[(row_blocks * splits,)](
        hidden, weight, bias, labels.contiguous(), split_lse, split_target,
        rows, vocabulary, width, hidden.stride(0), weight.stride(0), tiles_per_split,
        softcap or 1.0, logit_scale,
        HAS_BIAS=bias is not None, SOFTCAP=softcap is not None,
        EVEN_WIDTH=width % config.block_k == 0, **config.launch(),
    )  # fmt: skip
    # the label lies in one split, the others hold -inf
    lse = split_lse.logsumexp(dim=0)
    return split_target.amax(dim=0) - lse, lse
