"""The algorithm of ``linear_sequence_loss``: loss and all gradients in one pass over the head.

    for each chunk of whole sequences:
        logits    = hidden[chunk] @ weight.T                       # GEMM 1
        log_probs = row_log_probs(logits, labels)
        loss, g   = loss and its derivative in the log-probs
        row_gradient_(logits, labels, g)                           # logits <- d loss / d logits
        d_hidden[chunk] = logits @ weight                          # GEMM 2
        d_weight       += logits.T @ hidden[chunk]                 # GEMM 3

A chunk is all rows wherever ``cost`` allows. ``chunk_rows=0`` holds no logits at all: forward
operator, loss and g, backward operator.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from npo_fast.kernels.reference import segment_sum
from npo_fast.ops.checks import capturing
from npo_fast.ops.head import Gradients, HeadGradients, Needs, held_factor
from npo_fast.ops.linear_log_probs import blocks
from npo_fast.ops.skipping import Skipped
from npo_fast.ops.vocab_parallel import VocabularySlice, head_of

Reference = Literal["sequence", "token"] | None


class SequenceLoss(Protocol):
    """What ``linear_sequence_loss`` asks of a loss: one value a sequence from its token log-probs.

    ``reference`` says what ``ref_log_probs`` holds: one value a "sequence", one a "token", or
    nothing (None). ``group`` consecutive sequences may depend on each other (pairs: 2; the whole
    batch: 0) and are never split between chunks; where it is 2 or more, the loss returns one value
    a group, and "mean" is over groups.

    A loss may also have ``value_and_weight``, with the arguments of ``__call__``, that returns its
    values, the log-probs of the sequences (s,) and its derivative (n,) at once; without it
    autograd differentiates ``__call__``. Who overrides one overrides both.
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
class Plan:
    """What one call decides before it meets a tensor."""

    loss: SequenceLoss
    softcap: float | None
    logit_scale: float
    count: int  # what the sum over sequences is divided by
    chunk_rows: int  # 0: no logits at all
    skip_below: float = 0.0
    skipped: Skipped | None = None
    vocabulary: VocabularySlice | None = None  # weight and bias are those of a slice

    def held(self, dtype: torch.dtype) -> float:
        return held_factor(dtype, self.count)


def loss_alone(plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor]:  # scalar, (S,)
    head = head_of(inputs.weight, inputs.bias, plan.softcap, plan.logit_scale, plan.vocabulary)
    log_probs = head.log_probs(inputs.hidden, inputs.labels)
    offsets = _beside(inputs.cu_seqlens, inputs.hidden.device)
    value = plan.loss(log_probs, offsets, inputs.ref_log_probs).sum() / plan.count
    return value, segment_sum(log_probs, offsets)


def loss_and_gradients(
    plan: Plan, needs: Needs, inputs: Inputs
) -> tuple[Tensor, Tensor, Gradients]:  # scalar, (S,)
    if plan.chunk_rows == 0:
        return _without_logits(plan, needs, inputs)
    hidden, weight, bias, labels, cu_seqlens, ref_log_probs = inputs
    head = head_of(weight, bias, plan.softcap, plan.logit_scale, plan.vocabulary)
    step, scale = plan.chunk_rows, 1 / plan.count
    # in fp16 the gradient of the logits is formed as large as it can be
    g_scale, alpha = scale, 1.0
    if weight.dtype == torch.float16:
        g_scale, alpha = 1.0, scale * plan.held(weight.dtype)
    gradients = HeadGradients(head, hidden, needs, step, plan.skip_below, plan.skipped)
    total = hidden.new_zeros((), dtype=head.opmath_dtype)
    sequence_log_probs = total.new_empty(len(cu_seqlens) - 1)
    for rows, sequences, offsets in _chunks(plan, cu_seqlens, hidden):
        one_pass = rows.stop - rows.start <= step
        if one_pass:
            logits = head.logits(hidden[rows], gradients.logits)
            softmax = head.softmax(logits, hidden[rows], labels[rows])
            log_probs = softmax.log_probs[: rows.stop - rows.start]
        else:  # the weight g needs the whole group: its log-probs first, its gradient after
            log_probs = head.log_probs(hidden[rows], labels[rows])
        ref = _part(ref_log_probs, plan.loss, rows, sequences)
        value, sequence_log_probs[sequences], g = _evaluate(plan.loss, log_probs, offsets, ref)
        total += value
        g = g * g_scale
        if one_pass:
            gradients.add(rows, hidden[rows], logits, softmax, g, alpha)
            continue
        for block in blocks(rows, step):
            logits = head.logits(hidden[block], gradients.logits)
            at = slice(block.start - rows.start, block.stop - rows.start)
            softmax = head.softmax(logits, hidden[block], labels[block])
            gradients.add(block, hidden[block], logits, softmax, g[at], alpha)
    return total * scale, sequence_log_probs, gradients.finish()


def _without_logits(
    plan: Plan, needs: Needs, inputs: Inputs
) -> tuple[Tensor, Tensor, Gradients]:  # scalar, (S,)
    hidden, weight, bias, labels, cu_seqlens, ref_log_probs = inputs
    settings, scale = (plan.softcap, plan.logit_scale), 1 / plan.count
    log_probs, lse = torch.ops.npo_fast.linear_log_probs(hidden, weight, labels, bias, *settings)
    offsets = _beside(cu_seqlens, hidden.device)
    value, sequence_log_probs, g = _evaluate(plan.loss, log_probs, offsets, ref_log_probs)
    gradients = torch.ops.npo_fast.linear_log_probs_backward(
        g * (scale * plan.held(weight.dtype)), hidden, weight, labels, bias, log_probs, lse,
        *settings, needs,
    )  # fmt: skip
    d_hidden, d_weight, d_bias = (
        gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
    )
    return value * scale, sequence_log_probs, (d_hidden, d_weight, d_bias)


def _chunks(
    plan: Plan, cu_seqlens: Tensor, hidden: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Whole groups of sequences, as many as fit a chunk: (rows, sequences, offsets)."""
    rows, sequences, step = len(hidden), len(cu_seqlens) - 1, plan.chunk_rows
    group = plan.loss.group or max(sequences, 1)
    beside = _beside(cu_seqlens, hidden.device)
    # one chunk, or a CUDA graph that cannot look where sequences end: nothing to read from a GPU
    if rows <= step or group >= sequences or capturing(hidden.device):
        yield slice(0, rows), slice(0, sequences), beside
        return
    bounds = cu_seqlens.tolist()
    first = 0
    while first < sequences:
        last = first + group
        while last < sequences and bounds[last + group] - bounds[first] <= step:
            last += group
        offsets = beside[first : last + 1] - bounds[first]
        yield slice(bounds[first], bounds[last]), slice(first, last), offsets
        first = last


def _beside(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """On the device of the rows; from the host through pinned memory, so that nothing waits."""
    if cu_seqlens.device.type == "cpu" and device.type == "cuda":
        cu_seqlens = cu_seqlens.pin_memory()
    return cu_seqlens.to(device, non_blocking=True)


def _part(
    ref_log_probs: Tensor | None, loss: SequenceLoss, rows: slice, sequences: slice
) -> Tensor | None:
    if ref_log_probs is None:
        return None
    return ref_log_probs[sequences if loss.reference == "sequence" else rows]


def _evaluate(
    loss: SequenceLoss, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # summed loss, (s,) log-probs, (n,) g = d loss / d log_probs
    in_one = getattr(loss, "value_and_weight", None)
    if in_one is not None:
        values, sequence_log_probs, g = in_one(log_probs, cu_seqlens, ref_log_probs)
        return values.sum(), sequence_log_probs, g
    with torch.enable_grad():
        log_probs = log_probs.detach().requires_grad_()
        value = loss(log_probs, cu_seqlens, ref_log_probs).sum()
        (g,) = torch.autograd.grad(value, log_probs)
    return value.detach(), segment_sum(log_probs.detach(), cu_seqlens), g
