"""The operators and their plain PyTorch kernels: the specification of every faster kernel.

The row operators see one chunk of raw logits ``a = W h + b`` (before softcap and scale) and compute

    z_n        = logit_scale * softcap * tanh(a_n / softcap)      (softcap optional)
    log_prob_n = z_n[y_n] - logsumexp(z_n)

``row_log_probs_`` also replaces the chunk by the gradient of its own log-probabilities,

    d log_prob_n / d a_n = (onehot(y_n) - softmax(z_n)) * d z_n / d a_n

so that no second buffer of this size exists. Rows go through in slabs that stay in cache.
``npo_head`` goes on from the token log-probs to the NPO loss of the sequences.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SLAB_BYTES = 4 << 20  # a few rows at a time: the passes of one slab hit cache, not memory
TILE_BYTES = 32 << 20  # of logits that linear_log_probs has at a time
TILE_ROWS = 2048

library = torch.library.Library("npo_fast", "DEF")
library.define(
    "row_log_probs_(Tensor(a!) logits, Tensor labels, Tensor? target_logits, "
    "float? softcap, float logit_scale) -> (Tensor, Tensor)"
)
library.define(
    "tile_log_probs_(Tensor logits, Tensor labels, float? softcap, float logit_scale, "
    "Tensor(a!) others, Tensor(b!) target) -> ()"
)
library.define(
    "linear_log_probs(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, "
    "float? softcap, float logit_scale) -> (Tensor log_probs, Tensor lse)"
)
library.define(
    "npo_head(Tensor log_probs, Tensor cu_seqlens, Tensor ref_log_probs, float beta) "
    "-> (Tensor values, Tensor sequence_log_probs, Tensor g)"
)


def row_log_probs_(
    logits: Tensor,  # (R, V) raw logits; on return d log_prob / d logits
    labels: Tensor,  # (R,) int64 in [0, V)
    target_logits: Tensor | None,  # (R,) raw target logits that replace the rounded ones
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:  # log_probs (R,), lse (R,): fp32, or fp64 for fp64 logits
    log_probs, lse = _outputs(logits)
    for rows in _slabs(logits):
        z, slope = _activate(logits[rows], labels[rows], _at(target_logits, rows), softcap)
        shifted, log_probs[rows], lse[rows] = _normalise(z * logit_scale, labels[rows])
        grad = shifted.exp_()
        grad.div_(grad.sum(dim=-1, keepdim=True)).neg_()
        # onehot - softmax cancels at a sure token; 1 - p from the log-prob does not
        column = labels[rows].unsqueeze(1)
        grad.scatter_(1, column, -torch.expm1(log_probs[rows]).unsqueeze(1))
        if slope is not None:
            grad.mul_(slope)
        logits[rows] = grad.mul_(logit_scale).to(logits.dtype)
    return log_probs, lse


def tile_log_probs_(
    logits: Tensor,  # (R, C) raw logits of a slice of the vocabulary, left alone
    labels: Tensor,  # (R,) int64, counted from the first column of the slice; may lie outside
    softcap: float | None,
    logit_scale: float,
    others: Tensor,  # (R,) fp64 logsumexp of the columns so far without the label; -inf at first
    target: Tensor,  # (R,) fp64 z at the label, written by the slice that has it
) -> None:
    """One slice of the vocabulary after another into the log-probs of whole rows.

    The label stays apart so that ``log_prob = -log(1 + exp(others - target))`` does not cancel
    where the model is sure of it.
    """
    for rows in _slabs(logits):
        z = (_activate(logits[rows], labels[rows], None, softcap)[0] * logit_scale).double()
        mine = ((labels[rows] >= 0) & (labels[rows] < z.shape[1])).nonzero().squeeze(1)
        column = labels[rows][mine]
        target[rows] = target[rows].index_copy(0, mine, z[mine, column])
        z[mine, column] = -torch.inf
        others[rows] = torch.logaddexp(others[rows], z.logsumexp(dim=1))


def linear_log_probs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64 in [0, V)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:  # log_probs (N,), lse (N,): fp32, or fp64 for fp64 inputs
    """Log-probs of the labels under a linear head, a tile of the logits at a time.

    Tiles are many rows high and a slice of the vocabulary wide, since BLAS repacks its slice of
    the weight for every block of rows.
    """
    wide = _wide(weight.dtype)
    log_probs = hidden.new_empty(len(hidden), dtype=wide)
    lse = torch.empty_like(log_probs)
    vocabulary, width = weight.shape
    for first in range(0, len(hidden), TILE_ROWS):
        rows = slice(first, min(first + TILE_ROWS, len(hidden)))
        block = hidden[rows].to(wide)
        converted = 0 if weight.dtype == wide else width
        columns = max(64, TILE_BYTES // (wide.itemsize * (len(block) + converted)))
        tile = block.new_empty(len(block), min(columns, vocabulary))
        others = block.new_full((len(block),), -torch.inf, dtype=torch.float64)
        target = torch.full_like(others, torch.nan)  # where no slice has the label
        for left in range(0, vocabulary, columns):
            part = weight[left : left + columns].to(wide)
            logits = tile[:, : len(part)]
            if bias is None:
                torch.mm(block, part.t(), out=logits)
            else:
                torch.addmm(bias[left : left + columns].to(wide), block, part.t(), out=logits)
            torch.ops.npo_fast.tile_log_probs_(
                logits, labels[rows] - left, softcap, logit_scale, others, target
            )
        high, low = torch.maximum(others, target), torch.minimum(others, target)
        above = torch.log1p(torch.exp(low - high))
        log_probs[rows], lse[rows] = (target - high) - above, high + above
    return log_probs, lse


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


def _activate(
    logits: Tensor, labels: Tensor, target_logits: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Softcapped logits in at least fp32, and the slope of the softcap where there is one."""
    raw = logits.to(_wide(logits.dtype))
    if target_logits is not None:
        raw = raw.scatter(1, labels.unsqueeze(1), target_logits.to(raw.dtype).unsqueeze(1))
    if softcap is None:
        return raw, None
    tanh = (raw / softcap).tanh_()
    return tanh * softcap, 1 - tanh.square()


def _normalise(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``z - max(z)``, the log-probs of the labels and the logsumexp, each rounded once or twice."""
    top = z.amax(dim=-1, keepdim=True)
    shifted = z - top
    log_sum = shifted.exp().sum(dim=-1).log_()
    log_probs = shifted.gather(1, labels.unsqueeze(1)).squeeze(1) - log_sum
    return shifted, log_probs, top.squeeze(1) + log_sum


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    shape, dtype = logits.shape[:1], _wide(logits.dtype)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=dtype)


def _at(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


def _slabs(logits: Tensor) -> list[slice]:
    rows, vocabulary = logits.shape
    step = max(1, SLAB_BYTES // (4 * max(1, vocabulary)))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _row_fake(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    return _outputs(logits)


def _npo_head_fake(
    log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    values = log_probs.new_empty(cu_seqlens.shape[0] - 1)
    return values, torch.empty_like(values), torch.empty_like(log_probs)


def _tile_fake(
    logits: Tensor,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    others: Tensor,
    target: Tensor,
) -> None:
    return None


def _linear_fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    return _outputs(hidden)


# by name: the kernel, and the shapes and dtypes that it returns
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "row_log_probs_": (row_log_probs_, _row_fake),
    "tile_log_probs_": (tile_log_probs_, _tile_fake),
    "linear_log_probs": (linear_log_probs, _linear_fake),
    "npo_head": (npo_head, _npo_head_fake),
}
for _name, (_kernel, _shapes) in OPERATORS.items():
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"npo_fast::{_name}", _shapes, lib=library)
