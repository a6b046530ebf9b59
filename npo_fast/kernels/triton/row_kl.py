"""Row kernels: KL to a reference from two rows of raw logits, its gradient written over the first.

    x_v   = log p_v - log p_ref_v
    kl_n  = sum_v p_ref (exp(x) - 1 - x)               (= sum_v p_ref (log p_ref - log p))
    a_n  <- (p - p_ref) * d z_n / d a_n                (in place)

Sums of slices of the vocabulary first (``slices``), for either; then tile by tile divergence and
gradient. Not allocated: either distribution, an fp32 copy of the logits. No atomics. 10 bytes a
bf16 logit move: each is read twice, and the gradient is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.transform import HeadTransform
from npo_fast.kernels.triton.config import RowConfig, row_config
from npo_fast.kernels.triton.math import activate, exp_tail, transform_arguments
from npo_fast.kernels.triton.slices import JOIN, grid_of, join, reachable_rows, slice_sums


@triton.jit
def join_kernel(
    peaks, totals, peak_out, total_out, rows, slices,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: joins the statistics of one row."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    peak, total = join(peaks, totals, row, rows, slices, BLOCK_R, BLOCK_S)
    tl.store(peak_out + row, peak, mask=row < rows)
    tl.store(total_out + row, total, mask=row < rows)


@triton.jit
def row_kl_kernel(
    logits, ref_logits, peaks, totals, ref_peaks, ref_totals, kls,
    rows, reachable, columns, row_stride, column_stride, ref_row_stride, ref_column_stride,
    slice_columns, softcap, logit_scale, ref_softcap, ref_logit_scale,
    SOFTCAP: tl.constexpr, REF_SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: divergence and gradient of some rows."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    within = tl.arange(0, BLOCK_C)
    slice_ = tl.num_programs(1) - 1 - tl.program_id(1)
    first = slice_ * slice_columns
    last = tl.minimum(first + slice_columns, columns)
    column, n = (first + within).to(tl.int64)[:, None], row.to(tl.int64)[None, :]
    at = logits + column * column_stride + n * row_stride
    ref_at = ref_logits + column * ref_column_stride + n * ref_row_stride
    step, ref_step = BLOCK_C * column_stride, BLOCK_C * ref_column_stride
    inside = row < rows
    peak = tl.load(peaks + row, mask=inside, other=0.0)[None, :]
    total = tl.load(totals + row, mask=inside, other=1.0)[None, :]
    ref_peak = tl.load(ref_peaks + row, mask=inside, other=0.0)[None, :]
    ref_total = tl.load(ref_totals + row, mask=inside, other=1.0)[None, :]
    lse_difference = (peak - ref_peak) + (tl.log(total) - tl.log(ref_total))
    share, ref_share = 1.0 / total, 1.0 / ref_total
    readable = (row < reachable)[None, :]
    sums = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_C):
        there = (start + within < last)[:, None]
        mask = there & readable
        raw = tl.load(at, mask=mask, other=0.0)
        ref_raw = tl.load(ref_at, mask=mask, other=0.0).to(tl.float32)
        z, slope = activate(raw.to(tl.float32), softcap, logit_scale, SOFTCAP)
        ref_z, _ = activate(ref_raw, ref_softcap, ref_logit_scale, REF_SOFTCAP)
        p = tl.exp(z - peak) * share
        p_ref = tl.exp(ref_z - ref_peak) * ref_share
        x = (z - ref_z) - lse_difference
        near = tl.abs(x) < 0.34  # elsewhere p - p_ref does not cancel
        tail = p_ref * exp_tail(tl.where(near, x, 0.0))
        difference = tl.where(near, p_ref * x + tail, p - p_ref)
        term = tl.where(near, tail, difference - p_ref * x)
        term = tl.where(p_ref == 0.0, p, term)  # 0 * log 0 = 0
        sums += tl.where(there, term, 0.0)
        gradient = (difference * slope).to(logits.dtype.element_ty)
        tl.store(at, tl.where(inside[None, :], gradient, raw), mask=mask)
        at += step
        ref_at += ref_step
    tl.store(kls + slice_.to(tl.int64) * rows + row, tl.sum(sums, axis=0), mask=inside)


def row_kl(
    logits: Tensor,  # (N, V) raw logits, as of ``empty_logits``; d kl / d logits on return
    ref_logits: Tensor,  # (N, V) raw logits of the reference
    transform: HeadTransform,
    ref_transform: HeadTransform,
    lse: Tensor | None = None,  # (N,) over all of the vocabulary, where the logits are of a slice
    ref_lse: Tensor | None = None,  # (N,) the same of the reference
    config: RowConfig | None = None,
) -> Tensor:  # kl (N,) fp32
    """Launches the kernels; logits become the gradient of kl in them."""
    rows, columns = logits.shape
    if rows == 0:
        return logits.new_empty(0, dtype=torch.float32)
    config = config or row_config()
    sums = _row_sums(logits, transform, lse, config)
    ref_sums = _row_sums(ref_logits, ref_transform, ref_lse, config)
    grid, slice_columns = grid_of(logits, config)
    kls = logits.new_empty(grid[1], rows, dtype=torch.float32)
    row_kl_kernel[grid](
        logits, ref_logits, *sums, *ref_sums, kls,
        rows, min(reachable_rows(logits), reachable_rows(ref_logits)), columns,
        *logits.stride(), *ref_logits.stride(), slice_columns,
        **transform_arguments(transform), **transform_arguments(ref_transform, "ref_"),
        BLOCK_R=config.block_rows, BLOCK_C=config.kl_block_columns, num_warps=config.num_warps,
    )  # fmt: skip
    return kls.sum(dim=0)


def _row_sums(
    logits: Tensor, transform: HeadTransform, lse: Tensor | None, config: RowConfig
) -> tuple[Tensor, Tensor]:  # peak (N,), total (N,)
    if lse is not None:
        return lse.float().contiguous(), torch.ones_like(lse, dtype=torch.float32)
    sums = slice_sums(logits, None, transform, config)
    slices, rows = sums.peaks.shape
    peak, total = torch.empty_like(sums.peaks[0]), torch.empty_like(sums.peaks[0])
    grid = (triton.cdiv(rows, JOIN["BLOCK_R"]),)
    join_kernel[grid](*sums, peak, total, rows, slices, **JOIN, num_warps=4)
    return peak, total
