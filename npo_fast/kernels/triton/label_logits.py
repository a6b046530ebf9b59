"""Gather kernel: the raw logit of each row's label, from operands instead of rounded logits.

    out_n = sum_d h_nd * w_{y_n, d} + b_{y_n}        in fp32

Not allocated: the gathered rows of the weight, an fp32 copy of anything.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # of the width, a step: 16 bytes a thread and load


@triton.jit
def label_logits_kernel(
    hidden, weight, labels, bias, out, width, hidden_stride, weight_stride,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the logits of the labels of some rows."""
    n = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + n).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + lanes < width
        h = tl.load(hidden + n * hidden_stride + start + lanes, mask=inside, other=0.0)
        w = tl.load(weight + label * weight_stride + start + lanes, mask=inside, other=0.0)
        sums += h.to(tl.float32) * w.to(tl.float32)
    total = tl.sum(sums)
    if HAS_BIAS:
        total += tl.load(bias + label).to(tl.float32)
    tl.store(out + n, total)


def label_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) in [0, V)
    bias: Tensor | None,  # (V,)
) -> Tensor:  # (N,) fp32
    """Launches the kernel: returns the raw logits of the labels."""
    out = hidden.new_empty(len(hidden), dtype=torch.float32)
    if len(out):
        label_logits_kernel[(len(out),)](
            hidden, weight, labels.contiguous(), bias, out,
            hidden.shape[1], hidden.stride(0), weight.stride(0),
            HAS_BIAS=bias is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out
