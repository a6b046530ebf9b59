"""Tile kernel: the gradient of one chunk of the head's rows, complete.

    d_weight[v, :] = sum over n of G[n, v] * h_n        for v in the chunk

One program owns a tile of d_weight and walks over all rows in order, with an fp32 accumulator: no
atomics, and no fp32 copy of d_weight (V x D x 4 bytes), because each tile is written once.
"""

import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.triton.config import TileConfig
from npo_fast.kernels.triton.tiles import dot, grouped, rows_inside


@triton.jit
def weight_gradient_kernel(
    gradient, hidden, d_weight,
    row_count, padded_rows, chunk, first_column, vocabulary, width,
    gradient_stride, hidden_stride, out_stride,
    EVEN_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    v_blocks = chunk // BLOCK_M
    v_block, column_block = grouped(tl.program_id(0), v_blocks, tl.cdiv(width, BLOCK_N))
    within = v_block * BLOCK_M + tl.arange(0, BLOCK_M)
    v = first_column + within
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(padded_rows // BLOCK_K):
        n = (step * BLOCK_K + k).to(tl.int64)
        a = tl.load(gradient + n[None, :] * gradient_stride + within[:, None])
        h = rows_inside(0, step, BLOCK_K, row_count)
        hidden_tile = hidden + h[:, None] * hidden_stride + column[None, :]
        if EVEN_WIDTH:
            b = tl.load(hidden_tile)
        else:
            b = tl.load(hidden_tile, mask=(column < width)[None, :], other=0.0)
        total = dot(a, b, total)
    out = d_weight + v.to(tl.int64)[:, None] * out_stride + column[None, :]
    inside = (v < vocabulary)[:, None] & (column < width)[None, :]
    tl.store(out, total.to(d_weight.dtype.element_ty), mask=inside)


def weight_gradient(
    d_weight: Tensor,  # (V, D): rows first_column to first_column + C are written
    gradient: Tensor,  # (N padded, C padded)
    hidden: Tensor,  # (N, D)
    first_column: int,
    config: TileConfig,
) -> None:
    vocabulary, width = d_weight.shape
    padded_rows, chunk = gradient.shape
    assert chunk % config.block_m == 0
    assert padded_rows % config.block_k == 0
    programs = chunk // config.block_m * triton.cdiv(width, config.block_n)
    weight_gradient_kernel[(programs,)](
        gradient, hidden, d_weight,
        hidden.shape[0], padded_rows, chunk, first_column, vocabulary, width,
        gradient.stride(0), hidden.stride(0), d_weight.stride(0),
        EVEN_WIDTH=width % config.block_n == 0, **config.launch(),
    )  # fmt: skip
