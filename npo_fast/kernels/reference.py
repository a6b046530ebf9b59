"""Plain PyTorch kernels of every operator: the specification, and the default on every device.

A row kernel sees a chunk of raw logits ``a = W h + b`` (before the ``HeadTransform``) and computes

    z_n        = logit_scale * softcap * tanh(a_n / softcap)      (softcap optional)
    log_prob_n = z_n[y_n] - logsumexp(z_n)

``row_gradient_`` replaces the chunk by the gradient of a loss with derivative g in the log-probs,

    d loss / d a_n = g_n * (onehot(y_n) - softmax(z_n)) * d z_n / d a_n

so that no second buffer of this size exists. ``row_kl_`` compares a chunk of logits with one of a
reference model and replaces it by the gradient of that divergence. Rows are taken a slab at a time.

The linear kernels get hidden states instead: some rows go through a slice of the vocabulary at a
time, so that nothing V-wide exists. Their backward kernel makes the logits of each slice again.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast.kernels.layout import (
    empty_gradients,
    empty_per_row,
    opmath_dtype,
    product_dtype,
    spans,
)
from npo_fast.kernels.products import logits_of_slices
from npo_fast.kernels.transform import HeadTransform

SLAB_BYTES = 4 << 20  # the passes over one slab hit cache, not memory
TILE_BYTES = 32 << 20  # of logits: TILE_ROWS rows times a slice of the vocabulary
TILE_ROWS = 2048  # BLAS packs a slice of the weight anew for each tile
LEAST_COLUMNS = 64  # of a slice: with fewer, its GEMM costs more than it computes


# ---- rows of logits ----


def row_log_probs(
    logits: Tensor,  # (R, V) raw logits
    labels: Tensor,  # (R,) int64 in [0, V)
    target_logits: Tensor | None,  # (R,) raw target logits that replace the rounded ones
    transform: HeadTransform,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (R,) each: fp32, or fp64 for fp64 logits
    """Returns log_probs, lse, and shift and share with ``softmax(z) = exp(z - shift) * share``.

    These are more exact than ``exp(z - lse)``.
    """
    log_probs, lse, shift, share = (empty_per_row(logits) for _ in range(4))
    for rows in _slabs(logits):
        raw = logits[rows].to(lse.dtype)
        if target_logits is not None:
            target = target_logits[rows].to(raw.dtype)
            raw = raw.scatter(1, labels[rows].unsqueeze(1), target.unsqueeze(1))
        z = transform.apply(raw)
        top, column = z.max(dim=-1)
        shifted = z.sub_(top.unsqueeze(1))
        at_label = shifted.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
        # 1 + rest would round away the digits of a sure token
        rest = shifted.exp_().scatter_(1, column.unsqueeze(1), 0.0).sum(dim=-1)
        log_probs[rows] = at_label - rest.log1p()
        lse[rows], shift[rows], share[rows] = top + rest.log1p(), top, 1 / (1 + rest)
    return log_probs, lse, shift, share


def row_gradient_(
    logits: Tensor,  # (R, C) raw logits of the vocabulary or a slice; on return d loss / d logits
    labels: Tensor,  # (R,) int64, counted from the first column; may lie outside
    log_probs: Tensor,  # (R,) of the labels
    shift: Tensor,  # (R,)
    share: Tensor,  # (R,) softmax is exp(z - shift) * share
    g: Tensor,  # (R,) d loss / d log_prob
    transform: HeadTransform,
) -> None:
    """Replaces raw logits by ``g * (onehot(y) - softmax(z)) * dz / da``."""
    opmath = opmath_dtype(logits.dtype)
    for rows in _slabs(logits):
        z, slope, factor = transform.apply_with_slope(logits[rows].to(opmath))
        grad = z.sub_(shift[rows].unsqueeze(1)).exp_()
        grad.mul_(share[rows].unsqueeze(1)).neg_()
        # onehot - softmax cancels at a sure token; 1 - p from the log-prob does not
        mine, column = _labels_within(labels[rows], z)
        grad[mine, column] = -torch.expm1(log_probs[rows][mine])
        if slope is not None:
            grad.mul_(slope)
        grad.mul_((g[rows].to(opmath) * factor).unsqueeze(1))
        logits[rows] = grad.to(logits.dtype)


def tile_log_probs_(
    logits: Tensor,  # (R, C) raw logits of a slice of the vocabulary, left alone
    labels: Tensor,  # (R,) int64, counted from the first column of the slice; may lie outside
    transform: HeadTransform,
    others: Tensor,  # (R,) fp64 logsumexp of the columns so far without the label; -inf at first
    target: Tensor,  # (R,) fp64 z at the label, written by the slice that has it
) -> None:
    """Adds one slice of the vocabulary to the sums of each row.

    The label stays apart for ``_with_label``.
    """
    for rows in _slabs(logits):
        z = transform.apply(logits[rows].to(opmath_dtype(logits.dtype))).double()
        mine, column = _labels_within(labels[rows], z)
        target[rows] = target[rows].index_copy(0, mine, z[mine, column])
        z[mine, column] = -torch.inf
        others[rows] = torch.logaddexp(others[rows], z.logsumexp(dim=1))


def row_kl_(
    logits: Tensor,  # (R, V) raw logits; on return d kl / d logits
    ref_logits: Tensor,  # (R, V) raw logits of the reference, left alone
    transform: HeadTransform,
    ref_transform: HeadTransform,
    lse: Tensor | None = None,  # (R,) over all of the vocabulary, where the logits are of a slice
    ref_lse: Tensor | None = None,  # (R,) the same of the reference
) -> Tensor:  # kl (R,): fp32, or fp64 for fp64 logits
    """Returns ``KL_n = sum_v p_ref (log p_ref - log p)``; logits <- ``(p - p_ref) * dz / da``.

    Of a slice it returns what that adds to the sum over the vocabulary.

    With ``x = log p - log p_ref`` the sum is taken over ``p_ref (exp(x) - 1 - x)``, which adds
    ``p - p_ref`` to each term: nothing in all, but no term is negative, and a model that is near
    its reference gets a small sum of small terms instead of a difference of large ones.
    """
    kl = empty_per_row(logits)
    for rows in _slabs(logits):
        z, slope, factor = transform.apply_with_slope(logits[rows].to(kl.dtype))
        ref_z = ref_transform.apply(ref_logits[rows].to(kl.dtype))
        (p, top, log_sum) = _softmax(z, None if lse is None else lse[rows])
        (p_ref, ref_top, ref_log_sum) = _softmax(ref_z, None if ref_lse is None else ref_lse[rows])
        x = (z - ref_z) - (top - ref_top) - (log_sum - ref_log_sum)
        near = x.abs() < 0.5  # elsewhere expm1 may overflow, and p - p_ref does not cancel
        grad = torch.where(near, p_ref * torch.expm1(x), p - p_ref)
        terms = torch.where(p_ref == 0, p, grad - p_ref * x)
        kl[rows] = terms.clamp_(min=0).sum(dim=-1, dtype=torch.float64).to(kl.dtype)
        if slope is not None:
            grad.mul_(slope)
        logits[rows] = grad.mul_(factor).to(logits.dtype)
    return kl


def _softmax(z: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns probabilities, and the logsumexp as two columns that add up to it.

    ``lse`` is given where it is that of more columns.
    """
    if lse is not None:
        top = lse.to(z.dtype).unsqueeze(1)
        return (z - top).exp_(), top, torch.zeros_like(top)
    top = z.amax(dim=-1, keepdim=True)
    p = (z - top).exp_()
    total = p.sum(dim=-1, keepdim=True)
    return p.div_(total), top, total.log()


def _labels_within(labels: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:  # (R,), (R, C) -> (K,)
    """Returns the rows whose label is a column of ``z``, and these columns."""
    rows = ((labels >= 0) & (labels < z.shape[1])).nonzero().squeeze(1)
    return rows, labels[rows]


def _slabs(logits: Tensor) -> list[slice]:
    rows, vocabulary = logits.shape
    return spans(rows, max(1, SLAB_BYTES // (4 * max(1, vocabulary))))


# ---- a linear head ----


def label_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64 in [0, V)
    bias: Tensor | None,  # (V,)
) -> Tensor:  # (N,) fp32, or fp64 for fp64 inputs
    """Returns ``w_{y_n} h_n + b_{y_n}``: the raw target logits, not rounded to half precision."""
    out = empty_per_row(hidden)
    for rows in _slabs(hidden):
        gathered = weight[labels[rows]].to(out.dtype)
        out[rows] = (hidden[rows].to(out.dtype) * gathered).sum(-1)
        if bias is not None:
            out[rows] += bias[labels[rows]].to(out.dtype)
    return out


def linear_log_probs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64 in [0, V)
    bias: Tensor | None,  # (V,)
    transform: HeadTransform,
) -> tuple[Tensor, Tensor]:  # log_probs (N,), lse (N,): fp32, or fp64 for fp64 inputs
    """Returns log-probs of the labels and the logsumexp of each row."""
    log_probs, lse = empty_per_row(hidden), empty_per_row(hidden)
    dtype = product_dtype(weight)
    for rows in spans(len(hidden), TILE_ROWS):
        others = torch.full_like(lse[rows], -torch.inf, dtype=torch.float64)
        target = torch.full_like(others, torch.nan)
        for columns, logits in _slices(hidden[rows], weight, bias, dtype):
            torch.ops.npo_fast.tile_log_probs_(
                logits, labels[rows] - columns.start, *transform, others, target
            )
        if dtype != lse.dtype:  # the logit of the label, not rounded
            raw = torch.ops.npo_fast.label_logits(hidden[rows], weight, labels[rows], bias)
            target = transform.apply(raw).double()
        log_probs[rows], lse[rows] = _with_label(others, target)
    return log_probs, lse


def _with_label(
    others: Tensor,  # (R,) logsumexp of the columns that are not the label
    target: Tensor,  # (R,) z at the label
) -> tuple[Tensor, Tensor]:  # log_probs and lse (R,)
    """Returns ``log_prob = -log(1 + exp(others - target))`` and the lse of all columns.

    Nothing cancels where the model is sure of the label.
    """
    high, low = torch.maximum(others, target), torch.minimum(others, target)
    above = torch.log1p(torch.exp(low - high))
    return (target - high) - above, high + above


def linear_log_probs_backward(
    g: Tensor,  # (N,) d loss / d log_prob
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    log_probs: Tensor,  # (N,) of the forward operator
    lse: Tensor,  # (N,) of the forward operator
    transform: HeadTransform,
    needs: Sequence[bool],  # hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:  # in the dtypes of hidden, weight, bias; empty: not needed
    """Returns the gradients of a loss with derivative ``g`` in the log-probs."""
    opmath = opmath_dtype(hidden.dtype)
    d_hidden, d_weight, d_bias = (
        torch.zeros_like(empty, dtype=opmath)
        for empty in empty_gradients(hidden, weight, bias, needs)
    )
    at_label = -torch.expm1(log_probs)  # onehot - softmax cancels at a sure token
    for rows in spans(len(hidden), TILE_ROWS):
        tile_hidden = hidden[rows].to(opmath)
        for columns, logits in _slices(tile_hidden, weight, bias, opmath):
            z, slope, factor = transform.apply_with_slope(logits)
            gradient = z.sub_(lse[rows].unsqueeze(1)).exp_().neg_()
            mine, column = _labels_within(labels[rows] - columns.start, z)
            gradient[mine, column] = at_label[rows][mine]
            gradient.mul_((g[rows] * factor).to(opmath).unsqueeze(1))
            if slope is not None:
                gradient.mul_(slope)
            if needs[0]:
                d_hidden[rows].addmm_(gradient, weight[columns].to(opmath))
            if needs[1]:
                d_weight[columns].addmm_(gradient.t(), tile_hidden)
            if needs[2] and bias is not None:
                d_bias[columns] += gradient.sum(dim=0)
    bias_dtype = hidden.dtype if bias is None else bias.dtype
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias.to(bias_dtype)


def _slices(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:  # columns, (R, C)
    """Yields slices of ``TILE_BYTES`` and their raw logits."""
    converted = 0 if weight.dtype == dtype else weight.shape[1]  # the weight in fp32 counts
    row_bytes = dtype.itemsize * (max(1, len(hidden)) + converted)
    step = max(LEAST_COLUMNS, TILE_BYTES // row_bytes)
    return logits_of_slices(hidden, weight, bias, dtype, step)


# ---- numbers ----


def scale_(values: Tensor, factor: Tensor) -> None:  # any shape, ()
    """Computes ``values *= factor``, without a pass over them where the factor is 1."""
    if factor.device.type != "cpu" or factor != 1:  # reading from a GPU would wait for it
        values.mul_(factor)


def npo_head(
    log_probs: Tensor,  # (N,) token log-probs of whole sequences, fp32 or fp64
    cu_seqlens: Tensor,  # (S + 1,) where the sequences begin and end, on any device
    ref_log_probs: Tensor,  # (S,)
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # values (S,), sequence_log_probs (S,), g (N,)
    """Returns ``L_i = -(2 / beta) logsigmoid(-beta r_i)``, ``l_i``, ``g_n = 2 sigmoid(beta r_i)``.

    ``r_i = l_i - ref_i``; ``g_n`` is ``dL_i / dl_i`` at every token n of sequence i.
    """
    sequence_log_probs = segment_sum(log_probs, cu_seqlens)
    x = beta * (sequence_log_probs - ref_log_probs.to(log_probs.dtype))
    values = -(2 / beta) * F.logsigmoid(-x)
    tokens = cu_seqlens.diff().to(log_probs.device)
    g = (2 * torch.sigmoid(x)).repeat_interleave(tokens, output_size=len(log_probs))
    return values, sequence_log_probs, g


def segment_sum(
    values: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (S,)
    """Returns ``sum(values[cu_seqlens[i]:cu_seqlens[i + 1]])`` for each i; 0 where it is empty.

    Summed in fp64: one number a row costs nothing, and beta times its error goes into every g.
    """
    offsets = cu_seqlens.to(values.device, torch.int64)
    sums = torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0, unsafe=True)
    return sums.to(values.dtype)
