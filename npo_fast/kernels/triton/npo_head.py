"""Sequence kernel: token log-probs to NPO values and per-token loss weights in one launch.

    l_i = sum of log_probs over sequence i,   r_i = l_i - ref_i
    L_i = -(2 / beta) * logsigmoid(-beta * r_i) = (2 / beta) * softplus(beta * r_i)
    g_n = dL_i / dl_i = 2 * sigmoid(beta * r_i)       for every token n of sequence i

Not allocated: the autograd graph of those lines, any intermediate. One program a sequence walks
over its tokens twice, first to sum and then to write: no atomics, a fixed order of addition.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.triton.math import softplus

BLOCK = 1024  # tokens a step; answers are shorter, so most sequences take one


@triton.jit
def npo_head_kernel(
    log_probs, cu_seqlens, ref_log_probs, values, sequence_log_probs, weights, beta,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: loss and slope of one sequence."""
    i = tl.program_id(0)
    begin = tl.load(cu_seqlens + i).to(tl.int64)
    end = tl.load(cu_seqlens + i + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)

    sums = tl.zeros((BLOCK,), tl.float64)  # as the reference: beta times its error is in every g
    for start in range(begin, end, BLOCK):
        tokens = tl.load(log_probs + start + lanes, mask=start + lanes < end, other=0.0)
        sums += tokens.to(tl.float64)
    sequence = tl.sum(sums).to(tl.float32)
    x = beta * (sequence - tl.load(ref_log_probs + i).to(tl.float32))
    tl.store(values + i, 2.0 / beta * softplus(x))
    tl.store(sequence_log_probs + i, sequence)

    # 2 * sigmoid(x) without overflow, from the same exp on both sides of 0
    small = tl.exp(-tl.abs(x))
    weight = 2.0 * tl.where(x < 0, small, 1.0) / (1.0 + small)
    for start in range(begin, end, BLOCK):
        spread = tl.zeros((BLOCK,), tl.float32) + weight
        tl.store(weights + start + lanes, spread, mask=start + lanes < end)


def npo_head(
    log_probs: Tensor,  # (N,) fp32
    cu_seqlens: Tensor,  # (S + 1,) int32 or int64
    ref_log_probs: Tensor,  # (S,)
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # values (S,), sequence_log_probs (S,), g (N,): fp32
    """Launches the kernel; ``linear_sequence_loss`` takes g as the derivative in the log-probs."""
    assert log_probs.dtype == torch.float32, log_probs.dtype
    sequences = len(cu_seqlens) - 1
    values = log_probs.new_empty(sequences)
    sequence_log_probs = torch.empty_like(values)
    g = torch.empty_like(log_probs)
    if sequences:
        npo_head_kernel[(sequences,)](
            log_probs.contiguous(), cu_seqlens.to(log_probs.device).contiguous(),
            ref_log_probs.contiguous(), values, sequence_log_probs, g, beta,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return values, sequence_log_probs, g
