"""Scaling kernels: by a number that only the device knows, and row by row.

``loss.backward()`` hands every gradient the factor 1. To read it on the host is to wait for the
GPU, and to multiply all the same moves the gradient of the head through memory once more: the
kernel looks, and leaves where it is 1. Rows in half precision are scaled by fp32 factors; PyTorch's
product of mixed dtypes takes three times as long.
"""

import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.triton.config import processors

BLOCK = 4096
ROW_BLOCK = 2048  # of a row
PROGRAMS = 8  # a processor


@triton.jit
def scale_kernel(gradient, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, count, step):
            at = start + lanes
            inside = at < count
            value = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(gradient + at, (value * by).to(gradient.dtype.element_ty), mask=inside)


def scale(
    values: Tensor,  # contiguous, any shape
    factor: Tensor,  # () on the device of values
) -> None:
    count = values.numel()
    if count:
        programs = min(triton.cdiv(count, BLOCK), PROGRAMS * processors(values.device))
        scale_kernel[(programs,)](values, factor, count, BLOCK=BLOCK, num_warps=4)


@triton.jit
def scale_rows_kernel(out, hidden, factors, width, out_stride, hidden_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(hidden + row * hidden_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(factors + row).to(tl.float32)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


def scale_rows(
    out: Tensor,  # (R, D), of any dtype; may be values
    values: Tensor,  # (R, D)
    factors: Tensor,  # (R,)
) -> None:
    rows, width = values.shape
    if rows and width:
        scale_rows_kernel[(rows, triton.cdiv(width, ROW_BLOCK))](
            out, values, factors.contiguous(), width, out.stride(0), values.stride(0),
            BLOCK=ROW_BLOCK, num_warps=4,
        )  # fmt: skip
