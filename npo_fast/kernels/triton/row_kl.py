"""Row kernel: KL to a reference from two rows of raw logits, its gradient written over the first.

    x_v   = log p_v - log p_ref_v
    kl_n  = sum_v p_ref (exp(x) - 1 - x)               (= sum_v p_ref (log p_ref - log p))
    a_n  <- (p - p_ref) * d z_n / d a_n                (in place)

Not allocated: either distribution, an fp32 copy of the logits. One program a row, no atomics. Both
rows are read twice, backwards the second time: their tails are then still in cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.triton.config import RowConfig, row_config
from npo_fast.kernels.triton.math import activate, exp_tail, online_add

LOWEST = tl.constexpr(-3.0e38)  # finite, so that the difference of two of them is 0 and not NaN


@triton.jit
def _block_z(
    row, columns, vocabulary, softcap, logit_scale,
    SOFTCAP: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """One block of a row: z (-inf past the end) and dz / da."""
    inside = columns < vocabulary
    raw = tl.load(row + columns, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    z, slope = activate(raw, softcap, logit_scale, SOFTCAP)
    return tl.where(inside, z, -float("inf")), slope


@triton.jit
def row_kl_kernel(
    logits, ref_logits, kls, vocabulary, row_stride, ref_row_stride,
    softcap, logit_scale, ref_softcap, ref_logit_scale,
    SOFTCAP: tl.constexpr, REF_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)  # n * V passes 2^31
    row = logits + n * row_stride
    ref_row = ref_logits + n * ref_row_stride
    lanes = tl.arange(0, BLOCK)

    # one row after the other: the running (peak, total) of a single row stays in registers
    peaks = tl.full((BLOCK,), LOWEST, tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        z, _ = _block_z(row, start + lanes, vocabulary, softcap, logit_scale, SOFTCAP, "evict_last")
        peaks, totals = online_add(peaks, totals, z)
    peak = tl.max(peaks)
    total = tl.sum(totals * tl.exp(peaks - peak))

    peaks = tl.full((BLOCK,), LOWEST, tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        z, _ = _block_z(
            ref_row, start + lanes, vocabulary, ref_softcap, ref_logit_scale,
            REF_SOFTCAP, "evict_last",
        )  # fmt: skip
        peaks, totals = online_add(peaks, totals, z)
    ref_peak = tl.max(peaks)
    ref_total = tl.sum(totals * tl.exp(peaks - ref_peak))

    lse_difference = (peak - ref_peak) + (tl.log(total) - tl.log(ref_total))
    sums = tl.zeros((BLOCK,), tl.float32)
    last = (vocabulary - 1) // BLOCK * BLOCK
    for back in range(0, vocabulary, BLOCK):
        columns = last - back + lanes
        z, slope = _block_z(row, columns, vocabulary, softcap, logit_scale, SOFTCAP, "evict_first")
        ref_z, _ = _block_z(
            ref_row, columns, vocabulary, ref_softcap, ref_logit_scale, REF_SOFTCAP, "evict_first"
        )
        p = tl.exp(z - peak) / total
        p_ref = tl.exp(ref_z - ref_peak) / ref_total
        x = (z - ref_z) - lse_difference
        near = tl.abs(x) < 0.34  # elsewhere p - p_ref does not cancel
        tail = p_ref * exp_tail(tl.where(near, x, 0.0))
        difference = tl.where(near, p_ref * x + tail, p - p_ref)
        term = tl.where(near, tail, difference - p_ref * x)
        sums += tl.where(p_ref == 0.0, p, term)  # 0 * log 0 = 0
        gradient = difference * slope
        tl.store(row + columns, gradient.to(logits.dtype.element_ty), mask=columns < vocabulary)
    tl.store(kls + n, tl.sum(sums))


def row_kl(
    logits: Tensor,  # (R, V) raw logits, rows contiguous; d kl / d logits on return
    ref_logits: Tensor,  # (R, V) raw logits of the reference, rows contiguous
    softcap: float | None,
    logit_scale: float,
    ref_softcap: float | None,
    ref_logit_scale: float,
    config: RowConfig | None = None,
) -> Tensor:  # kl (R,) fp32
    rows, vocabulary = logits.shape
    kl = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return kl
    config = config or row_config()
    row_kl_kernel[(rows,)](
        logits, ref_logits, kl, vocabulary, logits.stride(0), ref_logits.stride(0),
        softcap or 1.0, logit_scale, ref_softcap or 1.0, ref_logit_scale,
        SOFTCAP=softcap is not None, REF_SOFTCAP=ref_softcap is not None,
        BLOCK=config.block, num_warps=config.warps(config.block),
    )  # fmt: skip
    return kl
