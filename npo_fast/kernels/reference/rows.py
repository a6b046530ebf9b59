"""Plain PyTorch kernels on chunks of logits: the specification of the faster row kernels.

A row kernel sees a chunk of raw logits ``a = W h + b`` (before the ``HeadTransform``) and computes

    z_n        = logit_scale * softcap * tanh(a_n / softcap)      (softcap optional)
    log_prob_n = z_n[y_n] - logsumexp(z_n)

``row_gradient_`` replaces the chunk by the gradient of a loss with derivative g in the log-probs,

    d loss / d a_n = g_n * (onehot(y_n) - softmax(z_n)) * d z_n / d a_n

so that no second buffer of this size exists. ``row_kl_`` compares a chunk of logits with one of a
reference model and replaces it by the gradient of that divergence. Rows are taken a slab at a time.
"""

import torch
from torch import Tensor

from npo_fast.kernels.layout import opmath_dtype
from npo_fast.kernels.transform import HeadTransform

SLAB_BYTES = 4 << 20  # the passes over one slab hit cache, not memory


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
        top = z.amax(dim=-1)
        shifted = z - top.unsqueeze(1)
        total = shifted.exp().sum(dim=-1)
        at_label = shifted.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
        log_probs[rows] = at_label - total.log()
        lse[rows], shift[rows], share[rows] = top + total.log(), top, 1 / total
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
        z, slope = transform.apply_with_slope(logits[rows].to(opmath))
        grad = z.sub_(shift[rows].unsqueeze(1)).exp_()
        grad.mul_(share[rows].unsqueeze(1)).neg_()
        # onehot - softmax cancels at a sure token; 1 - p from the log-prob does not
        column = labels[rows]
        mine = ((column >= 0) & (column < z.shape[1])).nonzero().squeeze(1)
        grad[mine, column[mine]] = -torch.expm1(log_probs[rows][mine])
        if slope is not None:
            grad.mul_(slope)
        grad.mul_((g[rows].to(opmath) * transform.logit_scale).unsqueeze(1))
        logits[rows] = grad.to(logits.dtype)


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


def tile_log_probs_(
    logits: Tensor,  # (R, C) raw logits of a slice of the vocabulary, left alone
    labels: Tensor,  # (R,) int64, counted from the first column of the slice; may lie outside
    transform: HeadTransform,
    others: Tensor,  # (R,) fp64 logsumexp of the columns so far without the label; -inf at first
    target: Tensor,  # (R,) fp64 z at the label, written by the slice that has it
) -> None:
    """Adds one slice of the vocabulary to the sums of each row.

    The label stays apart for ``with_label``.
    """
    for rows in _slabs(logits):
        raw = logits[rows].to(opmath_dtype(logits.dtype))
        z = transform.apply(raw).double()
        mine = ((labels[rows] >= 0) & (labels[rows] < z.shape[1])).nonzero().squeeze(1)
        column = labels[rows][mine]
        target[rows] = target[rows].index_copy(0, mine, z[mine, column])
        z[mine, column] = -torch.inf
        others[rows] = torch.logaddexp(others[rows], z.logsumexp(dim=1))


def row_kl_(
    logits: Tensor,  # (R, V) raw logits; on return d kl / d logits
    ref_logits: Tensor,  # (R, V) raw logits of the reference, left alone
    transform: HeadTransform,
    ref_transform: HeadTransform,
) -> Tensor:  # kl (R,): fp32, or fp64 for fp64 logits
    """Returns ``KL_n = sum_v p_ref (log p_ref - log p)``; logits <- ``(p - p_ref) * dz / da``.

    With ``x = log p - log p_ref`` the sum is taken over ``p_ref (exp(x) - 1 - x)``, which adds
    ``p - p_ref`` to each term: nothing in all, but no term is negative, and a model that is near
    its reference gets a small sum of small terms instead of a difference of large ones.
    """
    kl = logits.new_empty(logits.shape[0], dtype=opmath_dtype(logits.dtype))
    for rows in _slabs(logits):
        z, slope = transform.apply_with_slope(logits[rows].to(kl.dtype))
        ref_z = ref_transform.apply(ref_logits[rows].to(kl.dtype))
        (p, top, log_sum), (p_ref, ref_top, ref_log_sum) = _softmax(z), _softmax(ref_z)
        x = (z - ref_z) - (top - ref_top) - (log_sum - ref_log_sum)
        near = x.abs() < 0.5  # elsewhere expm1 may overflow, and p - p_ref does not cancel
        grad = torch.where(near, p_ref * torch.expm1(x), p - p_ref)
        terms = torch.where(p_ref == 0, p, grad - p_ref * x)
        kl[rows] = terms.clamp_(min=0).sum(dim=-1, dtype=torch.float64).to(kl.dtype)
        if slope is not None:
            grad.mul_(slope)
        logits[rows] = grad.mul_(transform.logit_scale).to(logits.dtype)
    return kl


def _softmax(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, and the logsumexp as two columns that add up to it."""
    top = z.amax(dim=-1, keepdim=True)
    p = (z - top).exp_()
    total = p.sum(dim=-1, keepdim=True)
    return p.div_(total), top, total.log()


def empty_per_row(values: Tensor) -> Tensor:  # (R, …) -> (R,)
    """Returns one uninitialised number a row, in the opmath dtype."""
    return values.new_empty(values.shape[:1], dtype=opmath_dtype(values.dtype))


def _slabs(logits: Tensor) -> list[slice]:
    rows, vocabulary = logits.shape
    step = max(1, SLAB_BYTES // (4 * max(1, vocabulary)))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
