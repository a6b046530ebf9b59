"""Tile kernel: what one chunk of the vocabulary adds to the gradient of hidden.

    d_hidden[n, :] += sum over v in the chunk of G[n, v] * W[v, :]

One program owns a tile of d_hidden (fp32) and walks over the chunk in order: no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.triton.config import TileConfig
from npo_fast.kernels.triton.tiles import dot, grouped, rows_inside


@triton.jit
def hidden_gradient_kernel(
    gradient, weight, d_hidden,
    row_count, chunk, first_column, vocabulary, width,
    gradient_stride, weight_stride, out_stride,
    ACCUMULATE: tl.constexpr, EVEN_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(row_count, BLOCK_M)
    row_block, column_block = grouped(tl.program_id(0), row_blocks, tl.cdiv(width, BLOCK_N))
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    gradient_tile = gradient + row.to(tl.int64)[:, None] * gradient_stride + k[None, :]
    out = d_hidden + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    inside = (row < row_count)[:, None] & (column < width)[None, :]

    if ACCUMULATE:  # before the loop: afterwards it would need a second accumulator's registers
        total = tl.load(out, mask=inside, other=0.0)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(chunk // BLOCK_K):
        v = rows_inside(first_column, step, BLOCK_K, vocabulary)
        weight_tile = weight + v[:, None] * weight_stride + column[None, :]
        a = tl.load(gradient_tile + step * BLOCK_K)
        if EVEN_WIDTH:
            b = tl.load(weight_tile)
        else:
            b = tl.load(weight_tile, mask=(column < width)[None, :], other=0.0)
        total = dot(a, b, total)
    tl.store(out, total, mask=inside)


def hidden_gradient(
    d_hidden: Tensor,  # (N, D) fp32: written, or added to
    gradient: Tensor,  # (N padded, C padded)
    weight: Tensor,  # (V, D)
    first_column: int,
    accumulate: bool,
    config: TileConfig,
) -> None:
    rows, width = d_hidden.shape
    assert gradient.shape[0] % config.block_m == 0
    assert gradient.shape[1] % config.block_k == 0
    programs = triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n)
    hidden_gradient_kernel[(programs,)](
        gradient, weight, d_hidden,
        rows, gradient.shape[1], first_column, weight.shape[0], width,
        gradient.stride(0), weight.stride(0), d_hidden.stride(0),
        ACCUMULATE=accumulate, EVEN_WIDTH=width % config.block_n == 0, **config.launch(),
    )  # fmt: skip
