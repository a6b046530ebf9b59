"""Tile kernel: the gradient of the loss in the logits, for one chunk of the vocabulary.

    G[n, v] = g_n * (onehot(y_n)[v] - softmax(z_n)[v]) * d z_n / d a_n

recomputed from hidden, weight and the logsumexp of the forward pass, in the dtype of hidden.
Not allocated: anything wider than the chunk. Rows and columns that pad the chunk to whole tiles
are written as zeros, so that the two GEMMs that follow need no masks.
"""

import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.triton.config import TileConfig
from npo_fast.kernels.triton.math import one_minus_exp
from npo_fast.kernels.triton.tiles import grouped, logits_tile, rows_inside


@triton.jit
def logits_gradient_kernel(
    hidden, weight, bias, labels, g, log_probs, lse, gradient,
    row_count, first_column, vocabulary, width, hidden_stride, weight_stride, gradient_stride,
    softcap, logit_scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, EVEN_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(row_count, BLOCK_M)
    column_blocks = tl.num_programs(0) // row_blocks
    row_block, column_block = grouped(tl.program_id(0), row_blocks, column_blocks)
    rows = rows_inside(0, row_block, BLOCK_M, row_count)
    columns = rows_inside(first_column, column_block, BLOCK_N, vocabulary)
    z, slope = logits_tile(
        hidden, weight, bias, rows, columns, width,
        hidden_stride, weight_stride, softcap, logit_scale,
        HAS_BIAS, SOFTCAP, EVEN_WIDTH, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    label = tl.load(labels + rows).to(tl.int32)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    within = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    column = first_column + within
    # onehot - softmax cancels at a sure token; 1 - p from the log-prob does not
    at_label = one_minus_exp(tl.load(log_probs + rows))
    tile = -tl.exp(z - tl.load(lse + rows)[:, None])
    tile = tl.where(column[None, :] == label[:, None], at_label[:, None], tile)
    tile = tile * slope * tl.load(g + rows).to(tl.float32)[:, None]
    inside = (row < row_count)[:, None] & (column < vocabulary)[None, :]
    tile = tl.where(inside, tile, 0.0)
    at = gradient + row.to(tl.int64)[:, None] * gradient_stride + within[None, :]
    tl.store(at, tile.to(gradient.dtype.element_ty))


def logits_gradient(
    gradient: Tensor,  # (N padded, C padded) in whole tiles: written
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    g: Tensor,  # (N,)
    log_probs: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    first_column: int,
    softcap: float | None,
    logit_scale: float,
    config: TileConfig,
) -> None:
    rows, width = hidden.shape
    programs = gradient.shape[0] // config.block_m * (gradient.shape[1] // config.block_n)
    logits_gradient_kernel[(programs,)](
        hidden, weight, bias, labels, g, log_probs, lse, gradient,
        rows, first_column, weight.shape[0], width,
        hidden.stride(0), weight.stride(0), gradient.stride(0),
        softcap or 1.0, logit_scale,
        HAS_BIAS=bias is not None, SOFTCAP=softcap is not None,
        EVEN_WIDTH=width % config.block_k == 0, **config.launch(),
    )  # fmt: skip
