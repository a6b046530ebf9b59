"""The operators and their plain PyTorch kernels: the specification of every faster kernel.

The row operators see one chunk of raw logits ``a = W h + b`` (before softcap and scale) and compute

    z_n        = logit_scale * softcap * tanh(a_n / softcap)      (softcap optional)
    log_prob_n = z_n[y_n] - logsumexp(z_n)

``row_gradient_`` replaces the chunk by the gradient of a loss with derivative g in the log-probs,

    d loss / d a_n = g_n * (onehot(y_n) - softmax(z_n)) * d z_n / d a_n

so that no second buffer of this size exists. Rows go through in slabs that stay in cache.
``npo_head`` goes on from the token log-probs to the NPO loss of the sequences. ``row_kl_`` compares
a chunk of logits with one of a reference model, and replaces it by the gradient of that divergence.

``linear_log_probs`` and its backward operator start from hidden states instead. All rows go through
a slice of the vocabulary at a time, so nothing V-wide exists; the backward makes each slice again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast.kernels.layout import empty_gradients, empty_logits, product_dtype

SLAB_BYTES = 4 << 20  # a few rows at a time: the passes of one slab hit cache, not memory
TILE_BYTES = 32 << 20  # of logits: many rows times a slice of the vocabulary
TILE_ROWS = 2048
LEAST_COLUMNS = 64  # below, the GEMM of a slice costs more than it computes

library = torch.library.Library("npo_fast", "DEF")
library.define(
    "row_log_probs(Tensor logits, Tensor labels, Tensor? target_logits, float? softcap, "
    "float logit_scale) -> (Tensor log_probs, Tensor lse, Tensor shift, Tensor share)"
)
library.define(
    "row_gradient_(Tensor(a!) logits, Tensor labels, Tensor log_probs, Tensor shift, "
    "Tensor share, Tensor g, float? softcap, float logit_scale) -> ()"
)
library.define("label_logits(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias) -> Tensor")
library.define(
    "tile_log_probs_(Tensor logits, Tensor labels, float? softcap, float logit_scale, "
    "Tensor(a!) others, Tensor(b!) target) -> ()"
)
library.define(
    "npo_head(Tensor log_probs, Tensor cu_seqlens, Tensor ref_log_probs, float beta) "
    "-> (Tensor values, Tensor sequence_log_probs, Tensor g)"
)
library.define(
    "linear_log_probs(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, "
    "float? softcap, float logit_scale) -> (Tensor log_probs, Tensor lse)"
)
library.define(
    "linear_log_probs_backward(Tensor g, Tensor hidden, Tensor weight, Tensor labels, "
    "Tensor? bias, Tensor log_probs, Tensor lse, float? softcap, float logit_scale, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor)"
)
library.define("scale_(Tensor(a!) values, Tensor factor) -> ()")
library.define(
    "row_kl_(Tensor(a!) logits, Tensor ref_logits, float? softcap, float logit_scale, "
    "float? ref_softcap, float ref_logit_scale) -> Tensor"
)


def row_log_probs(
    logits: Tensor,  # (R, V) raw logits
    labels: Tensor,  # (R,) int64 in [0, V)
    target_logits: Tensor | None,  # (R,) raw target logits that replace the rounded ones
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (R,) each: fp32, or fp64 for fp64 logits
    """log_probs, lse, and ``softmax(z) = exp(z - shift) * share``: more exact than by the lse."""
    log_probs, lse, shift, share = (_row_output(logits) for _ in range(4))
    for rows in _slabs(logits):
        raw = logits[rows].to(lse.dtype)
        if target_logits is not None:
            target = target_logits[rows].to(raw.dtype)
            raw = raw.scatter(1, labels[rows].unsqueeze(1), target.unsqueeze(1))
        z = _capped(raw, softcap)[0] * logit_scale
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
    softcap: float | None,
    logit_scale: float,
) -> None:
    opmath = _wide(logits.dtype)
    for rows in _slabs(logits):
        z, slope = _capped(logits[rows].to(opmath), softcap)
        grad = (z * logit_scale).sub_(shift[rows].unsqueeze(1)).exp_()
        grad.mul_(share[rows].unsqueeze(1)).neg_()
        # onehot - softmax cancels at a sure token; 1 - p from the log-prob does not
        column = labels[rows]
        mine = ((column >= 0) & (column < z.shape[1])).nonzero().squeeze(1)
        grad[mine, column[mine]] = -torch.expm1(log_probs[rows][mine])
        if slope is not None:
            grad.mul_(slope)
        grad.mul_((g[rows].to(opmath) * logit_scale).unsqueeze(1))
        logits[rows] = grad.to(logits.dtype)


def label_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64 in [0, V)
    bias: Tensor | None,  # (V,)
) -> Tensor:  # (N,) fp32, or fp64 for fp64 inputs
    """``w_{y_n} h_n + b_{y_n}``: the raw target logits, not rounded to half precision."""
    out = _row_output(hidden)
    for rows in _slabs(hidden):
        gathered = weight[labels[rows]].to(out.dtype)
        out[rows] = (hidden[rows].to(out.dtype) * gathered).sum(-1)
        if bias is not None:
            out[rows] += bias[labels[rows]].to(out.dtype)
    return out


def tile_log_probs_(
    logits: Tensor,  # (R, C) raw logits of a slice of the vocabulary, left alone
    labels: Tensor,  # (R,) int64, counted from the first column of the slice; may lie outside
    softcap: float | None,
    logit_scale: float,
    others: Tensor,  # (R,) fp64 logsumexp of the columns so far without the label; -inf at first
    target: Tensor,  # (R,) fp64 z at the label, written by the slice that has it
) -> None:
    """One slice of the vocabulary after another into the log-probs of whole rows.

    The label stays apart for ``with_label``.
    """
    for rows in _slabs(logits):
        raw = logits[rows].to(_wide(logits.dtype))
        z = (_capped(raw, softcap)[0] * logit_scale).double()
        mine = ((labels[rows] >= 0) & (labels[rows] < z.shape[1])).nonzero().squeeze(1)
        column = labels[rows][mine]
        target[rows] = target[rows].index_copy(0, mine, z[mine, column])
        z[mine, column] = -torch.inf
        others[rows] = torch.logaddexp(others[rows], z.logsumexp(dim=1))


def npo_head(
    log_probs: Tensor,  # (N,) token log-probs of whole sequences, fp32 or fp64
    cu_seqlens: Tensor,  # (S + 1,) where the sequences begin and end, on any device
    ref_log_probs: Tensor,  # (S,)
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # values (S,), sequence_log_probs (S,), g (N,)
    """``l_i``, ``L_i = -(2 / beta) logsigmoid(-beta r_i)``, ``g_n = 2 sigmoid(beta r_i)``.

    ``r_i = l_i - ref_i``; ``g_n`` is ``dL_i / dl_i`` at every token n of sequence i.
    """
    sequence_log_probs = segment_sum(log_probs, cu_seqlens)
    x = beta * (sequence_log_probs - ref_log_probs.to(log_probs.dtype))
    values = -(2 / beta) * F.logsigmoid(-x)
    g = (2 * torch.sigmoid(x)).repeat_interleave(
        cu_seqlens.diff().to(log_probs.device), output_size=len(log_probs)
    )
    return values, sequence_log_probs, g


def linear_log_probs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64 in [0, V)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:  # log_probs (N,), lse (N,): fp32, or fp64 for fp64 inputs
    log_probs, lse = _row_output(hidden), _row_output(hidden)
    dtype = product_dtype(weight)
    for rows in _row_tiles(hidden):
        others = lse.new_full((rows.stop - rows.start,), -torch.inf, dtype=torch.float64)
        target = torch.full_like(others, torch.nan)
        for columns, logits in _column_tiles(hidden[rows], weight, bias, dtype):
            torch.ops.npo_fast.tile_log_probs_(
                logits, labels[rows] - columns.start, softcap, logit_scale, others, target
            )
        if dtype != lse.dtype:  # not the rounded one
            raw = torch.ops.npo_fast.label_logits(hidden[rows], weight, labels[rows], bias)
            target = (_capped(raw, softcap)[0] * logit_scale).double()
        log_probs[rows], lse[rows] = with_label(others, target)
    return log_probs, lse


def with_label(
    others: Tensor,  # (R,) logsumexp of the columns that are not the label
    target: Tensor,  # (R,) z at the label
) -> tuple[Tensor, Tensor]:  # log_probs and lse (R,)
    """``log_prob = -log(1 + exp(others - target))``: nothing cancels where the model is sure."""
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
    softcap: float | None,
    logit_scale: float,
    needs: Sequence[bool],  # hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:  # in the dtypes of hidden, weight, bias; empty: not wanted
    opmath = _wide(hidden.dtype)
    d_hidden, d_weight, d_bias = (
        torch.zeros_like(one, dtype=opmath) for one in empty_gradients(hidden, weight, bias, needs)
    )
    at_label = -torch.expm1(log_probs)  # onehot - softmax cancels at a sure token
    for rows in _row_tiles(hidden):
        block = hidden[rows].to(opmath)
        row_scale = (g[rows] * logit_scale).to(opmath).unsqueeze(1)
        for columns, logits in _column_tiles(block, weight, bias, opmath):
            column = labels[rows] - columns.start
            z, slope = _capped(logits.to(opmath), softcap)
            gradient = (z * logit_scale).sub_(lse[rows].unsqueeze(1)).exp_().neg_()
            mine = ((column >= 0) & (column < z.shape[1])).nonzero().squeeze(1)
            gradient[mine, column[mine]] = at_label[rows][mine]
            gradient.mul_(row_scale)
            if slope is not None:
                gradient.mul_(slope)
            if needs[0]:
                d_hidden[rows].addmm_(gradient, weight[columns].to(opmath))
            if needs[1]:
                d_weight[columns].addmm_(gradient.t(), block)
            if needs[2] and bias is not None:
                d_bias[columns] += gradient.sum(dim=0)
    bias_dtype = hidden.dtype if bias is None else bias.dtype
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias.to(bias_dtype)


def row_kl_(
    logits: Tensor,  # (R, V) raw logits; on return d kl / d logits
    ref_logits: Tensor,  # (R, V) raw logits of the reference, left alone
    softcap: float | None,
    logit_scale: float,
    ref_softcap: float | None,
    ref_logit_scale: float,
) -> Tensor:  # kl (R,): fp32, or fp64 for fp64 logits
    """``KL_n = sum_v p_ref (log p_ref - log p)``, ``d KL_n / d a_n = (p - p_ref) * d z_n / d a_n``.

    With ``x = log p - log p_ref`` the sum is taken over ``p_ref (exp(x) - 1 - x)``, which adds
    ``p - p_ref`` to each term: nothing in all, but no term is negative, and a model that is near
    its reference gets a small sum of small terms instead of a difference of large ones.
    """
    kl = logits.new_empty(logits.shape[0], dtype=_wide(logits.dtype))
    for rows in _slabs(logits):
        z, slope = _capped(logits[rows].to(kl.dtype), softcap)
        ref_z, _ = _capped(ref_logits[rows].to(kl.dtype), ref_softcap)
        z, ref_z = z * logit_scale, ref_z * ref_logit_scale
        (p, top, log_sum), (p_ref, ref_top, ref_log_sum) = _softmax(z), _softmax(ref_z)
        x = (z - ref_z) - (top - ref_top) - (log_sum - ref_log_sum)
        near = x.abs() < 0.5  # elsewhere expm1 may overflow, and p - p_ref does not cancel
        grad = torch.where(near, p_ref * torch.expm1(x), p - p_ref)
        terms = torch.where(p_ref == 0, p, grad - p_ref * x)
        kl[rows] = terms.clamp_(min=0).sum(dim=-1, dtype=torch.float64).to(kl.dtype)
        if slope is not None:
            grad.mul_(slope)
        logits[rows] = grad.mul_(logit_scale).to(logits.dtype)
    return kl


def scale_(values: Tensor, factor: Tensor) -> None:  # any shape, ()
    """``values *= factor``, without a pass over them where the factor is 1."""
    if factor.device.type != "cpu" or factor != 1:  # to read a GPU is to wait for it
        values.mul_(factor)


def segment_sum(
    values: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (S,)
    """``out[i] = sum(values[cu_seqlens[i]:cu_seqlens[i + 1]])``; an empty sequence sums to 0.

    Summed in fp64: one number a row costs nothing, and beta times its error goes into every g.
    """
    offsets = cu_seqlens.to(values.device, torch.int64)
    sums = torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0, unsafe=True)
    return sums.to(values.dtype)


def _capped(raw: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    if softcap is None:
        return raw, None
    tanh = (raw / softcap).tanh_()
    return tanh * softcap, 1 - tanh.square()


def _softmax(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, and the logsumexp as two columns that add up to it."""
    top = z.amax(dim=-1, keepdim=True)
    p = (z - top).exp_()
    total = p.sum(dim=-1, keepdim=True)
    return p.div_(total), top, total.log()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _row_output(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=_wide(logits.dtype))


def _slabs(logits: Tensor) -> list[slice]:
    rows, vocabulary = logits.shape
    step = max(1, SLAB_BYTES // (4 * max(1, vocabulary)))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _row_tiles(hidden: Tensor) -> list[slice]:
    """Many rows at a time: BLAS packs a slice of the weight anew for every block of rows."""
    rows = len(hidden)
    return [slice(at, min(at + TILE_ROWS, rows)) for at in range(0, rows, TILE_ROWS)]


def _column_tiles(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:  # columns, their raw logits (R, C) until the next ones
    vocabulary, width = weight.shape
    hidden = hidden.to(dtype)
    converted = 0 if weight.dtype == dtype else width  # the slice of the weight in fp32 counts
    step = max(LEAST_COLUMNS, TILE_BYTES // (dtype.itemsize * (max(1, len(hidden)) + converted)))
    tile = empty_logits(len(hidden), min(step, vocabulary), weight, dtype)
    for first in range(0, vocabulary, step):
        columns = slice(first, min(first + step, vocabulary))
        part, logits = weight[columns].to(dtype), tile[:, : columns.stop - first]
        if bias is None:
            torch.mm(hidden, part.t(), out=logits)
        else:
            torch.addmm(bias[columns].to(dtype), hidden, part.t(), out=logits)
        yield columns, logits


def _row_fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _row_output(logits), _row_output(logits), _row_output(logits), _row_output(logits)


def _label_fake(hidden: Tensor, *_: Any) -> Tensor:
    return _row_output(hidden)


def _npo_head_fake(
    log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    values = log_probs.new_empty(cu_seqlens.shape[0] - 1)
    return values, torch.empty_like(values), torch.empty_like(log_probs)


def _no_result(*_: Any) -> None:
    return None


def _linear_fake(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _row_output(hidden), _row_output(hidden)


def _linear_backward_fake(
    g: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, rest[-1])


def _row_kl_fake(logits: Tensor, *_: Any) -> Tensor:
    return _row_output(logits)


# by name: the kernel, and the shapes and dtypes that it returns
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "row_log_probs": (row_log_probs, _row_fake),
    "row_gradient_": (row_gradient_, _no_result),
    "label_logits": (label_logits, _label_fake),
    "tile_log_probs_": (tile_log_probs_, _no_result),
    "npo_head": (npo_head, _npo_head_fake),
    "linear_log_probs": (linear_log_probs, _linear_fake),
    "linear_log_probs_backward": (linear_log_probs_backward, _linear_backward_fake),
    "row_kl_": (row_kl_, _row_kl_fake),
    "scale_": (scale_, _no_result),
}
for _name, (_kernel, _shapes) in OPERATORS.items():
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"npo_fast::{_name}", _shapes, lib=library)
