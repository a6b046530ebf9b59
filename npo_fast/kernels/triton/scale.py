"""Scaling kernel: multiplies in place by a number that only the device knows; by 1, not at all.

``loss.backward()`` hands every gradient the factor 1. To read it on the host is to wait for the
GPU, and to multiply all the same moves the gradient of the head through memory once more.
"""

import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.triton.config import processors

BLOCK = 4096
PROGRAMS = 8  # a processor


@triton.jit
def scale_kernel(gradient, factor, count, BLOCK: tl.constexpr):
    """One program: multiplies a block of a tensor, in place."""
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
    """Launches the kernel: ``values *= factor``."""
    count = values.numel()
    if count:
        programs = min(triton.cdiv(count, BLOCK), PROGRAMS * processors(values.device))
        scale_kernel[(programs,)](values, factor, count, BLOCK=BLOCK, num_warps=4)
