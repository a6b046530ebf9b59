"""What the linear kernels share: the order of tiles, and one tile of logits made on chip."""

import triton
import triton.language as tl

from npo_fast.kernels.triton import config
from npo_fast.kernels.triton.math import activate

GROUP = tl.constexpr(config.GROUP)

# the interpreter multiplies the bit patterns of bf16; going up to fp32 first is exact
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, accumulator):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # "ieee" only matters for fp32 operands, which must not drop to tf32
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def rows_inside(first, block, BLOCK: tl.constexpr, limit):
    """Indices of a block behind ``first``, int64, those past ``limit`` repeating the last one.

    Loads then need no mask; what the repeated rows yield is masked once, at the end.
    """
    return tl.minimum(first + block * BLOCK + tl.arange(0, BLOCK), limit - 1).to(tl.int64)


@triton.jit
def grouped(program, row_blocks, column_blocks):
    """(row block, column block) of a program: groups of row blocks sweep the columns together.

    Programs that run at the same time then share tiles of both operands in L2.
    """
    group = program // (GROUP * column_blocks)
    within = program % (GROUP * column_blocks)
    size = tl.minimum(row_blocks - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def logits_tile(
    hidden, weight, bias, rows, columns, width, hidden_stride, weight_stride, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, EVEN_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) of z and dz / d raw logit, in fp32; rows and columns are int64."""
    k = tl.arange(0, BLOCK_K)
    hidden_tile = hidden + rows[:, None] * hidden_stride + k[None, :]
    weight_tile = weight + columns[None, :] * weight_stride + k[:, None]
    raw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_WIDTH:
            a = tl.load(hidden_tile)
            b = tl.load(weight_tile)
        else:
            inside = start + k < width
            a = tl.load(hidden_tile, mask=inside[None, :], other=0.0)
            b = tl.load(weight_tile, mask=inside[:, None], other=0.0)
        raw = dot(a, b, raw)
        hidden_tile += BLOCK_K
        weight_tile += BLOCK_K
    if HAS_BIAS:
        raw += tl.load(bias + columns).to(tl.float32)[None, :]
    return activate(raw, softcap, logit_scale, SOFTCAP)
