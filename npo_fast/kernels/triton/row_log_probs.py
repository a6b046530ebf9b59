"""Row kernels: log-probs of labels from raw logits, and the gradient of a loss written over them.

    z_n        = logit_scale * softcap * tanh(a_n / softcap)
    log_prob_n = z_n[y_n] - logsumexp(z_n)
    a_n       <- g_n * (onehot(y_n) - softmax(z_n)) * d z_n / d a_n        (in place)

Three launches: sums of slices of the vocabulary without the label (``slices``); a few numbers a row
from them; and, when the loss has been evaluated, the gradient, tile by tile. Not allocated:
probabilities, an fp32 copy of the logits, a one-hot. 6 bytes a bf16 logit move: two reads and a
write; the gradient goes through the logits backwards, whose end is then still in cache. No atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.transform import HeadTransform
from npo_fast.kernels.triton.config import RowConfig, row_config
from npo_fast.kernels.triton.math import activate, one_minus_exp, softplus, transform_arguments
from npo_fast.kernels.triton.slices import JOIN, Sums, grid_of, join, reachable_rows, slice_sums


@triton.jit
def label_kernel(
    peaks, totals, targets, log_probs, lses, shifts, shares,
    rows, slices, softcap, logit_scale,
    SOFTCAP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: the log-sum-exp of one row, and the log-prob of its label."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    peak, total = join(peaks, totals, row, rows, slices, BLOCK_R, BLOCK_S)
    raw = tl.load(targets + row, mask=inside, other=0.0)
    z, _ = activate(raw, softcap, logit_scale, SOFTCAP)
    log_total = tl.log(total)
    log_prob = -softplus((peak - z) + log_total)
    rest = peak + log_total
    lse = tl.where(z > rest, z - log_prob, rest + softplus(z - rest))  # z may be -inf
    tl.store(log_probs + row, log_prob, mask=inside)
    tl.store(lses + row, lse, mask=inside)
    # softmax of the others is exp(z - shift) * share
    tl.store(shifts + row, peak, mask=inside)
    tl.store(shares + row, 1.0 / (total + tl.exp(z - peak)), mask=inside)


@triton.jit
def gradient_kernel(
    logits, labels, log_probs, shifts, shares, g,
    rows, reachable, columns, row_stride, column_stride, slice_columns, softcap, logit_scale,
    SOFTCAP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a tile of logits becomes its gradient, in place."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    within = tl.arange(0, BLOCK_C)
    slice_ = tl.num_programs(1) - 1 - tl.program_id(1)
    first = slice_ * slice_columns
    last = tl.minimum(first + slice_columns, columns)
    at = logits + (first + within).to(tl.int64)[:, None] * column_stride
    at += row.to(tl.int64)[None, :] * row_stride
    step = BLOCK_C * column_stride
    inside = row < rows
    label = tl.load(labels + row, mask=inside, other=-1).to(tl.int32)[None, :]
    shift = tl.load(shifts + row, mask=inside, other=0.0)[None, :]
    share = tl.load(shares + row, mask=inside, other=0.0)[None, :]
    weight = tl.load(g + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    # onehot - softmax cancels at a sure token; 1 - p from the log-prob does not
    at_label = one_minus_exp(tl.load(log_probs + row, mask=inside, other=0.0))[None, :] * weight
    share = -share * weight
    readable = (row < reachable)[None, :]
    for start in range(first, last, BLOCK_C):
        column = (start + within)[:, None]
        mask = (column < last) & readable
        raw = tl.load(at, mask=mask, other=0.0)
        z, slope = activate(raw.to(tl.float32), softcap, logit_scale, SOFTCAP)
        gradient = tl.where(column == label, at_label, tl.exp(z - shift) * share) * slope
        gradient = gradient.to(logits.dtype.element_ty)
        tl.store(at, tl.where(inside[None, :], gradient, raw), mask=mask)
        at += step


def row_log_probs(
    logits: Tensor,  # (N, V) raw logits, fastest in the layout of ``empty_logits``
    labels: Tensor,  # (N,) int64 in [0, V)
    target_logits: Tensor | None,  # (N,) raw target logits that replace the rounded ones
    transform: HeadTransform,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # log_probs, lse, shift, share: (N,) fp32
    """Launches the sums of slices, then the label kernel."""
    if target_logits is None:
        target_logits = logits.gather(1, labels.unsqueeze(1)).squeeze(1).float()
    sums = slice_sums(logits, labels, transform, config or row_config())
    return with_labels(sums, target_logits, transform)


def with_labels(
    sums: Sums,  # of the columns that are not the label
    target_logits: Tensor,  # (N,) fp32, raw
    transform: HeadTransform,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # log_probs, lse, shift, share: (N,) fp32
    """Launches the label kernel: joins the sums of all slices with the logit of the label."""
    slices, rows = sums.peaks.shape
    log_probs, lse, shift, share = (sums.peaks.new_empty(rows) for _ in range(4))
    if rows:
        label_kernel[(triton.cdiv(rows, JOIN["BLOCK_R"]),)](
            *sums, target_logits.contiguous(), log_probs, lse, shift, share,
            rows, slices, **transform_arguments(transform), **JOIN, num_warps=4,
        )  # fmt: skip
    return log_probs, lse, shift, share


def row_gradient(
    logits: Tensor,  # (N, C) raw logits of a slice, or of all; d loss / d logits on return
    labels: Tensor,  # (N,) int64, counted from the first column; may lie outside
    log_probs: Tensor,  # (N,) fp32
    shift: Tensor,  # (N,) fp32
    share: Tensor,  # (N,) fp32: softmax is exp(z - shift) * share
    g: Tensor,  # (N,) d loss / d log_prob
    transform: HeadTransform,
    config: RowConfig | None = None,
) -> None:
    """Launches the gradient kernel: logits become the gradient of the loss in them."""
    config = config or row_config()
    if not logits.numel():
        return
    grid, slice_columns = grid_of(logits, config)
    row_operands = (t.contiguous() for t in (labels, log_probs, shift, share, g))
    gradient_kernel[grid](
        logits, *row_operands,
        len(labels), reachable_rows(logits), logits.shape[1], *logits.stride(), slice_columns,
        **transform_arguments(transform),
        BLOCK_R=config.block_rows, BLOCK_C=config.block_columns, num_warps=config.num_warps,
    )  # fmt: skip
