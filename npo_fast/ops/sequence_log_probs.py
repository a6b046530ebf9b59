"""Log-probabilities of whole sequences: shift, mask, gather and sum of a padded or packed batch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from npo_fast.errors import UserError
from npo_fast.kernels.transform import TransformOptions
from npo_fast.ops.checks import (
    check_cu_seqlens,
    check_device,
    check_label_dtype,
    check_tensors,
    shape_hint,
)
from npo_fast.ops.linear_log_probs import linear_log_probs
from npo_fast.ops.segments import segment_sum


def sequence_log_probs(
    hidden: Tensor,  # (B, T, D) or (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (B, T) or (N,)
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    attention_mask: Tensor | None = None,  # (B, T)
    shifted: bool = False,
    ignore_index: int = -100,
    average_log_prob: bool = False,
    bias: Tensor | None = None,  # (V,)
    chunk_rows: int | None = None,
    **transform: Unpack[TransformOptions],
) -> Tensor:  # (B,) or (S,)
    """``l_i = sum_t log p(labels[i, t + 1] | hidden[i, t])`` of every sequence i of a batch.

    Labels are those that Hugging Face models take, one a token of the input and not shifted: the
    hidden state of token t predicts label t + 1. The first label of a sequence is predicted by
    nothing and does not count, nor do those with ``ignore_index``. Rows without a label are dropped
    before the head: prompts and padding cost nothing. Differentiable in ``hidden``, ``weight`` and
    ``bias`` for any upstream gradient, as ``linear_log_probs`` is.

    Args:
        hidden: last hidden states of a padded batch, or of S sequences end to end with
            ``cu_seqlens``; (1, N, D) is taken for a pack too.
        weight, bias, softcap, logit_scale: the head; ``head_of(model)`` reads all of them.
        labels: int64 or int32, a token a position of ``hidden``.
        cu_seqlens: of a pack: sequence i is rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.
        attention_mask: of a padded batch: labels at a 0, and after one, do not count. It is needed
            where padding has labels of its own, such as the pad token.
        shifted: labels are shifted already: ``labels[b, t]`` is what ``hidden[b, t]`` predicts.
        average_log_prob: divide by the number of labels, ``l_i / |y_i|``.
        chunk_rows: as in ``linear_log_probs``.

    Returns:
        A log-prob a sequence in fp32 (fp64 for fp64 inputs); 0 where it has no label.

    Raises:
        UserError: shapes, dtypes, devices or labels that do not fit together.
    """
    op = "sequence_log_probs"
    if attention_mask is not None:
        labels = _masked(op, labels, attention_mask, shifted, ignore_index)
    rows = labelled_rows(op, hidden, labels, weight, cu_seqlens, ignore_index, shift=not shifted)
    log_probs = linear_log_probs(
        rows.of(hidden), weight, rows.labels, bias=bias, chunk_rows=chunk_rows, **transform
    )
    sums = segment_sum(log_probs, rows.cu_seqlens)
    return sums / rows.cu_seqlens.diff().clamp(min=1) if average_log_prob else sums


class LabelledRows(NamedTuple):
    """The rows of a batch that predict a label, sequence after sequence."""

    indices: Tensor  # (N,) rows of the batch, its sequences end to end
    labels: Tensor  # (N,)
    cu_seqlens: Tensor  # (S + 1,) of these rows
    length: int | None  # T of a padded batch

    def of(self, values: Tensor) -> Tensor:  # (B, T, …) or (rows, …) -> (N, …)
        """Returns these rows of hidden states, or of numbers in the shape of the labels."""
        if self.length is None:
            return values[self.indices]
        return values[self.indices // self.length, self.indices % self.length]

    def in_order(self, order: Tensor) -> "LabelledRows":  # (S,) numbers of sequences
        """Returns the same rows with the sequences in another order."""
        lengths = self.cu_seqlens.diff()[order]
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        moved = (self.cu_seqlens[order] - cu_seqlens[:-1]).repeat_interleave(
            lengths, output_size=len(self.indices)
        )
        rows = moved + torch.arange(len(moved), device=moved.device)
        return LabelledRows(self.indices[rows], self.labels[rows], cu_seqlens, self.length)


def labelled_rows(
    op: str,
    hidden: Tensor,  # (B, T, D) or (N, D)
    labels: Tensor,  # (B, T) or (N,)
    weight: Tensor,  # (V, D)
    cu_seqlens: Tensor | None,  # (S + 1,)
    ignore_index: int,
    *,
    shift: bool,
    name: str = "labels",
) -> LabelledRows:
    """Returns the rows of a padded or packed batch that predict a label.

    It reads how many there are, which costs a GPU one synchronisation. ``name`` is that of the
    labels in messages.

    Raises:
        UserError: shapes, dtypes, devices, labels or offsets that do not fit together.
    """
    check_tensors(op, **{"hidden": hidden, name: labels, "weight": weight})
    if hidden.dim() not in (2, 3) or labels.shape != hidden.shape[:-1]:
        raise UserError(
            f"{op}: hidden must be (B, T, D) with {name} (B, T), or (N, D) with {name} (N,), got "
            f"{tuple(hidden.shape)} and {tuple(labels.shape)}"
            f"{_label_hint(hidden, labels, weight, shift, name)}"
        )
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise UserError(
            f"{op}: hidden must be (…, D) and the weight of the head (V, D) with the same D, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}{shape_hint(hidden, weight)}"
        )
    check_label_dtype(op, name, labels)
    check_device(op, "hidden", hidden, name, labels)
    is_pack = hidden.dim() == 2 or (cu_seqlens is not None and len(hidden) == 1)
    if is_pack != (cu_seqlens is not None):
        offsets = None if cu_seqlens is None else tuple(cu_seqlens.shape)
        raise UserError(
            f"{op}: cu_seqlens belongs to flat (N, D) hidden states and to no other, got "
            f"hidden {tuple(hidden.shape)} and cu_seqlens {offsets}"
        )
    flat = labels.flatten()
    length = hidden.shape[1] if hidden.dim() == 3 else None
    if cu_seqlens is None:
        cu_seqlens = torch.arange(len(labels) + 1, device=labels.device) * labels.shape[1]
    else:
        check_cu_seqlens(op, cu_seqlens, len(flat), hidden.device)
        cu_seqlens = cu_seqlens.to(labels.device).long()
    if shift and len(flat):
        flat = F.pad(flat[1:], (0, 1), value=ignore_index)
        flat[cu_seqlens[1:] - 1] = ignore_index  # the next token is another sequence's
    keep = flat != ignore_index
    _check_values(op, name, flat, keep, len(weight), ignore_index)
    kept_before = F.pad(keep.cumsum(0), (1, 0))  # (rows + 1,)
    indices = keep.nonzero().squeeze(1)
    return LabelledRows(indices, flat[indices], kept_before[cu_seqlens], length)


def _masked(
    op: str, labels: Tensor, attention_mask: Tensor, shifted: bool, ignore_index: int
) -> Tensor:
    """Returns labels without those of padding, or predicted by padding."""
    check_tensors(op, labels=labels, attention_mask=attention_mask)
    if attention_mask.shape != labels.shape:
        raise UserError(
            f"{op}: attention_mask must have the shape of labels, {tuple(labels.shape)}, got "
            f"{tuple(attention_mask.shape)}"
        )
    if shifted:
        raise UserError(
            f"{op}: attention_mask goes with labels that are not shifted: drop shifted=True and "
            "pass hidden and labels whole"
        )
    check_device(op, "labels", labels, "attention_mask", attention_mask)
    real = attention_mask != 0
    before = F.pad(real[..., :-1], (1, 0), value=True)
    return labels.masked_fill(~(real & before), ignore_index)


def _label_hint(hidden: Tensor, labels: Tensor, weight: Tensor, shift: bool, name: str) -> str:
    """What was probably meant by shapes of hidden states and labels that do not fit."""
    if labels.shape == weight.shape[:-1]:
        return "; hidden and weight look swapped"
    if hidden.dim() != labels.dim() + 1 or hidden.shape[:-2] != labels.shape[:-1]:
        return shape_hint(hidden, weight)
    more = labels.shape[-1] - hidden.shape[-2]
    if more == 1 and shift:
        return "; the shift is done here: pass the hidden states of every token"
    if more == -1 and shift:
        return f"; the shift is done here: pass {name} that are not shifted"
    if more == 1:
        return f"; a position predicts the next token: pass {name}[..., 1:]"
    return "; the last position predicts nothing: pass hidden[..., :-1, :]" if more == -1 else ""


def _check_values(
    op: str, name: str, labels: Tensor, keep: Tensor, vocabulary: int, ignore_index: int
) -> None:
    """Raises UserError for a label outside the vocabulary; a GPU's are left to the operators."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = labels[keep & ((labels < 0) | (labels >= vocabulary))]
    if len(outside):
        raise UserError(
            f"{op}: {name} hold {int(outside[0])}, which is outside the vocabulary "
            f"[0, {vocabulary}) and is not ignore_index, {ignore_index}: name it as ignore_index "
            "where it stands for no label"
        )
