"""Tile kernel: what one chunk of the vocabulary adds to the gradient of hidden.

    d_hidden[n, :] += sum over v in the chunk of G[n, v] * W[v, :]

One program owns a tile of d_hidden (fp32) and walks over the chunk, or over the tiles of it that
are kept, in order: no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.triton.config import TileConfig
from npo_fast.kernels.triton.tiles import KeptTiles, dot, grouped, kept_arguments, rows_inside


@triton.jit
def hidden_gradient_kernel(
    gradient, kept, kept_count, weight, d_hidden,
    row_count, chunk, first_column, vocabulary, width,
    gradient_stride, weight_stride, out_stride,
    ACCUMULATE: tl.constexpr, SKIP: tl.constexpr, EVEN_WIDTH: tl.constexpr,
    KEEP_M: tl.constexpr, KEEP_N: tl.constexpr,
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
    steps = chunk // BLOCK_K
    if SKIP:
        tile_row = row_block * BLOCK_M // KEEP_M
        steps = tl.load(kept_count + tile_row) * (KEEP_N // BLOCK_K)
    for i in range(steps):
        step = i
        if SKIP:
            tile = tl.load(kept + tile_row * (chunk // KEEP_N) + i // (KEEP_N // BLOCK_K))
            step = tile * (KEEP_N // BLOCK_K) + i % (KEEP_N // BLOCK_K)
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
    kept: KeptTiles | None,  # of each row block of G; None: all of them
    weight: Tensor,  # (V, D)
    first_column: int,
    accumulate: bool,
    config: TileConfig,
    gradient_config: TileConfig,  # the tiles that ``kept`` counts
) -> None:
    rows, width = d_hidden.shape
    assert gradient.shape[0] % config.block_m == 0
    assert gradient.shape[1] % config.block_k == 0
    assert kept is None or gradient_config.block_m % config.block_m == 0
    assert kept is None or gradient_config.block_n % config.block_k == 0
    programs = triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n)
    hidden_gradient_kernel[(programs,)](
        gradient, *kept_arguments(kept), weight, d_hidden,
        rows, gradient.shape[1], first_column, weight.shape[0], width,
        gradient.stride(0), weight.stride(0), d_hidden.stride(0),
        ACCUMULATE=accumulate, SKIP=kept is not None, EVEN_WIDTH=width % config.block_n == 0,
        KEEP_M=gradient_config.block_m, KEEP_N=gradient_config.block_n, **config.launch(),
    )  # fmt: skip
