"""The algorithm of ``linear_sequence_loss``: loss and all gradients in one pass over the head.

    for each chunk of whole sequences:
        logits    = hidden[chunk] @ weight.T                       # GEMM 1
        log_probs = row_log_probs(logits, labels)
        loss, g   = loss and its derivative in the log-probs
        row_gradient_(logits, labels, g)                           # logits <- d loss / d logits
        d_hidden[chunk] = logits @ weight                          # GEMM 2
        d_weight       += logits.T @ hidden[chunk]                 # GEMM 3

A chunk is all rows wherever ``cost`` allows. ``chunk_rows=0`` makes no logits at all: forward
operator, loss and g, backward operator. The parts of a problem have one name each in this package:

    chunk   the rows whose logits are in memory at a time: whole sequences, or a part of one that
            is longer
    slice   neighbouring tokens of the vocabulary: columns of logits, rows of the head's weight
    tile    some rows times a slice: a rectangle of logits (a block of a GPU's program is a tile)
    strip   the slice of the weight's gradient that one GEMM writes
    slab    the part of a chunk that plain PyTorch code takes at a time, so that it stays in cache
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from npo_fast.kernels.layout import power_of_two
from npo_fast.kernels.reference import segment_sum
from npo_fast.kernels.transform import HeadTransform
from npo_fast.ops.checks import capturing
from npo_fast.ops.gradients import (
    FP16_SIZE,
    Gradients,
    HeadGradients,
    Needs,
    Unit,
    power_of_rows,
)
from npo_fast.ops.head import Head
from npo_fast.ops.linear_log_probs import split_rows
from npo_fast.ops.skipping import Skipped, without_small_rows
from npo_fast.ops.vocab_parallel import VocabularySlice, local_head

Reference = Literal["sequence", "token"] | None


class SequenceLoss(Protocol):
    """What ``linear_sequence_loss`` asks of a loss: one value a sequence from its token log-probs.

    ``reference`` says what ``ref_log_probs`` holds: one value a "sequence", one a "token", or
    nothing (None). ``group`` consecutive sequences may depend on each other (pairs: 2; the whole
    batch: 0) and are never split between chunks; where it is 2 or more, the loss returns one value
    a group, and "mean" is over groups.

    A loss may also have ``value_and_weight``, with the arguments of ``__call__``, that returns its
    values, the log-probs of the sequences (s,) and its derivative (n,) at once; without it
    autograd differentiates ``__call__``. A class that overrides one overrides both.
    """

    reference: ClassVar[Reference]
    group: ClassVar[int]

    def __call__(
        self,
        log_probs: Tensor,  # (n,) token log-probs of whole sequences
        cu_seqlens: Tensor,  # (s + 1,) where the sequences begin and end
        ref_log_probs: Tensor | None,  # (s,), (n,) or None
    ) -> Tensor: ...  # (s,), or (s / group,) where group is 2 or more


class Inputs(NamedTuple):
    """The tensors of one call, in the order in which autograd and the operator see them."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (S + 1,)
    ref_log_probs: Tensor | None  # (S,) or (N,)


@dataclass(frozen=True)
class LossConfig:
    """What one call of ``linear_sequence_loss`` is given beside tensors."""

    loss: SequenceLoss
    transform: HeadTransform
    count: int  # the sum over sequences is divided by it
    chunk_rows: int  # 0: no logits at all
    skip_below: float = 0.0
    vocabulary: VocabularySlice | None = None  # weight and bias are those of a slice

    def head(self, inputs: Inputs) -> Head:
        """Returns the head of ``inputs``."""
        return local_head(inputs.weight, inputs.bias, self.transform, self.vocabulary)


class Group(NamedTuple):
    """Whole sequences whose loss is evaluated at once: what fits a chunk, or a longer one."""

    rows: slice
    sequences: slice
    cu_seqlens: Tensor  # (s + 1,) counted from the first row, on the device of the rows
    ref_log_probs: Tensor | None  # (s,), (n,) or None


@torch.no_grad()
def loss_alone(config: LossConfig, inputs: Inputs) -> tuple[Tensor, Tensor]:  # scalar, (S,)
    """Returns the loss and the log-probs of the sequences, and makes no gradient."""
    log_probs = config.head(inputs).log_probs(inputs.hidden, inputs.labels)
    offsets = _whole(inputs).cu_seqlens
    value = config.loss(log_probs, offsets, inputs.ref_log_probs).sum() / config.count
    return value, segment_sum(log_probs, offsets)


def loss_and_gradients(
    config: LossConfig,
    needs: Needs,
    tensors: Sequence[Any],  # those of Inputs
    skipped: Skipped | None = None,
) -> tuple[Tensor, Tensor, Gradients]:  # scalar, (S,)
    """Returns the loss, the log-probs of the sequences, and the gradients that ``needs`` names."""
    inputs = Inputs(*tensors)
    if config.chunk_rows == 0:
        return _loss_and_gradients_without_logits(config, needs, inputs)
    hidden, labels, head = inputs.hidden, inputs.labels, config.head(inputs)
    gradients = HeadGradients(head, hidden, needs, config.chunk_rows)
    total = hidden.new_zeros((), dtype=head.opmath_dtype)
    sequence_log_probs = total.new_empty(len(inputs.cu_seqlens) - 1)
    scale = 1 / config.count

    def differentiate_loss(group: Group, log_probs: Tensor) -> Tensor:  # (n,) -> g (n,)
        value, sequence_log_probs[group.sequences], g = _value_and_g(config.loss, log_probs, group)
        total.add_(value)
        return g * scale

    for group in _groups(config, inputs):
        g, chunks = None, [group.rows]
        if group.rows.stop - group.rows.start > config.chunk_rows:
            # a longer sequence needs all of its log-probs before g: one more GEMM 1
            chunks = split_rows(group.rows, config.chunk_rows)
            g = differentiate_loss(group, head.log_probs(hidden[group.rows], labels[group.rows]))
        for rows in chunks:
            h, count = hidden[rows], rows.stop - rows.start
            # GEMM 1: h @ weight.T, and row log-probs
            logits, softmax = head.logits_and_softmax(h, labels[rows], gradients.logits)
            if g is None:
                g = differentiate_loss(group, softmax.log_probs[:count])
            g_rows, kept = g[rows.start - group.rows.start :][:count], None
            if config.skip_below > 0:
                logits, h, softmax, g_rows, kept = without_small_rows(
                    head, logits, h, softmax, g_rows, config.skip_below, skipped
                )
            g_rows = gradients.scaled(g_rows, softmax.log_probs[: len(g_rows)])
            head.differentiate_(logits, softmax, g_rows)  # in place: logits <- d loss / d logits
            gradients.set_hidden(rows, logits, kept)  # GEMM 2: logits @ weight
            gradients.add_weight(logits, h)  # GEMM 3: logits.T @ h, and the bias's sum
    return total * scale, sequence_log_probs, gradients.finish()


def _loss_and_gradients_without_logits(
    config: LossConfig, needs: Needs, inputs: Inputs
) -> tuple[Tensor, Tensor, Gradients]:  # scalar, (S,)
    operands = inputs.hidden, inputs.weight, inputs.labels, inputs.bias
    log_probs, lse = torch.ops.npo_fast.linear_log_probs(*operands, *config.transform)
    value, sequence_log_probs, g = _value_and_g(config.loss, log_probs, _whole(inputs))
    scale = 1 / config.count
    g = g * scale
    unit: Unit = 1.0
    if inputs.weight.dtype == torch.float16 and len(g):  # until the upstream gradient is known
        size = power_of_two((g.abs() * -torch.expm1(log_probs)).max())
        # one unit for the gradient of hidden, whose rows it makes small, and that of the weight
        unit = size * (config.transform.largest_slope * power_of_rows(len(g)) / (8 * FP16_SIZE))
        g = g / unit
    d_hidden, d_weight, d_bias = torch.ops.npo_fast.linear_log_probs_backward(
        g, *operands, log_probs, lse, *config.transform, needs
    )
    return value * scale, sequence_log_probs, Gradients(d_hidden, d_weight, d_bias, unit, unit)


def _groups(config: LossConfig, inputs: Inputs) -> Iterator[Group]:
    """As many sequences at a time as fit a chunk, and none of ``loss.group`` without the others."""
    ref, most_rows = inputs.ref_log_probs, config.chunk_rows
    rows, sequences = len(inputs.hidden), len(inputs.cu_seqlens) - 1
    step = config.loss.group or max(sequences, 1)
    whole = _whole(inputs)
    # one chunk, or a CUDA graph that cannot look where sequences end: nothing to read from a GPU
    if rows <= most_rows or step >= sequences or capturing(inputs.hidden.device):
        yield whole
        return
    bounds = inputs.cu_seqlens.tolist()
    first = 0
    while first < sequences:
        last = first + step
        while last < sequences and bounds[last + step] - bounds[first] <= most_rows:
            last += step
        group_rows, group_sequences = slice(bounds[first], bounds[last]), slice(first, last)
        ref_part = group_sequences if config.loss.reference == "sequence" else group_rows
        yield Group(
            group_rows,
            group_sequences,
            whole.cu_seqlens[first : last + 1] - bounds[first],
            None if ref is None else ref[ref_part],
        )
        first = last


def _whole(inputs: Inputs) -> Group:
    """Returns the group of all sequences; offsets leave the host through pinned memory."""
    cu_seqlens, device = inputs.cu_seqlens, inputs.hidden.device
    rows, sequences = slice(0, len(inputs.hidden)), slice(0, len(cu_seqlens) - 1)
    if cu_seqlens.device.type == "cpu" and device.type == "cuda":  # so that nothing waits
        cu_seqlens = cu_seqlens.pin_memory()
    cu_seqlens = cu_seqlens.to(device, non_blocking=True)
    return Group(rows, sequences, cu_seqlens, inputs.ref_log_probs)


def _value_and_g(
    loss: SequenceLoss, log_probs: Tensor, group: Group
) -> tuple[Tensor, Tensor, Tensor]:  # summed loss, (s,) log-probs, (n,) g = d loss / d log_probs
    arguments = group.cu_seqlens, group.ref_log_probs
    value_and_weight = getattr(loss, "value_and_weight", None)
    if value_and_weight is not None:
        values, sequence_log_probs, g = value_and_weight(log_probs, *arguments)
        return values.sum(), sequence_log_probs, g
    with torch.enable_grad():
        log_probs = log_probs.detach().requires_grad_()
        value = loss(log_probs, *arguments).sum()
        (g,) = torch.autograd.grad(value, log_probs)
    return value.detach(), segment_sum(log_probs.detach(), group.cu_seqlens), g
