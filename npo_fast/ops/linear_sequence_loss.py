"""Any loss of sequence log-probabilities with all its gradients, in one pass over the head."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from npo_fast.kernels.reference import segment_sum
from npo_fast.ops.autocast import autocast_inputs, no_autocast
from npo_fast.ops.checks import (
    check_cu_seqlens,
    check_head,
    check_labels,
    check_ref_log_probs,
)
from npo_fast.ops.head import Head, HeadGradients, scale_
from npo_fast.ops.linear_log_probs import blocks, forward_log_probs, resolve_chunk_rows
from npo_fast.ops.skipping import Skipped

Reduction = Literal["mean", "token_mean", "sum"]
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


def linear_sequence_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    loss: SequenceLoss,
    *,
    ref_log_probs: Tensor | None = None,  # (S,), or (N,) where the loss wants one a token
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
    skip_below: float = 0.0,
    skipped: Skipped | None = None,
) -> tuple[Tensor, Tensor]:  # scalar, (S,)
    """Loss of whole sequences straight from hidden states and the LM head.

        z_n = logit_scale * softcap(W h_n + b),    l_n = z_n[y_n] - logsumexp(z_n)
        loss = reduce_i L(l_n of sequence i, reference of sequence i)

    The forward pass computes the gradients too: chunks hold whole sequences, so each chunk's
    logits are made once, turned into their gradient in place and used up (6NDV flops, the three
    GEMMs that any method needs). A sequence longer than a chunk pays one more forward GEMM.

    Args:
        hidden: rows that predict a label, (N, D), fp32, bf16, fp16 or fp64; prompt and padding
            rows are left out by the caller.
        weight: the head, (V, D), in the dtype of ``hidden``. Frozen: its GEMM is not done.
        labels: the token each row predicts, (N,), int64 or int32, in [0, V): already shifted.
        cu_seqlens: (S + 1,), int32 or int64: sequence i is rows ``cu_seqlens[i]`` to
            ``cu_seqlens[i + 1]``. On the CPU it costs a GPU caller no synchronisation.
        loss: ``NPO(beta)`` and siblings, or anything that follows ``SequenceLoss``.
        ref_log_probs: log-probs under the reference model, one a sequence (or one a token).
        bias: (V,) or None.
        softcap: c in ``c * tanh(z / c)`` (Gemma 2), or None.
        logit_scale: factor on the (capped) logits.
        reduction: "mean" over the loss's values (one a sequence, or one a pair), "token_mean"
            (their sum / number of tokens), "sum".
        chunk_rows: rows whose logits are alive at a time; None takes what 96 MiB hold.
        skip_below: rows whose gradient is bounded by less than this fraction of the largest bound
            in their chunk are left out of the backward GEMMs; 0 is exact. ``Skipped`` has the
            bound. Costs a GPU caller one synchronisation a chunk.
        skipped: filled with the share of rows left out and the bounds on the error.

    Returns:
        The scalar loss, differentiable once in hidden, weight and bias, and the detached
        log-probs of the sequences, (S,); both fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes, devices, labels or offsets that do not fit together, an
            unknown reduction, or a missing reference.

    ``torch.compile`` takes a loss with ``value_and_weight`` (every one of this package) into its
    graph as one operator; the loss must be hashable, and labels and offsets are checked when the
    graph runs. Any other loss, or ``skip_below``, runs between two graphs: autograd cannot run in
    an operator.

    Source: NPO (arXiv 2404.05868) equation 3 for the loss; the fusion is this package's.
    """
    op = "linear_sequence_loss"
    in_graph = hasattr(loss, "value_and_weight") and skip_below == 0
    if torch.compiler.is_compiling() and not in_graph:
        return _between_graphs(
            hidden, weight, labels, cu_seqlens, loss, ref_log_probs=ref_log_probs, bias=bias,
            softcap=softcap, logit_scale=logit_scale, reduction=reduction, chunk_rows=chunk_rows,
            skip_below=skip_below, skipped=skipped,
        )  # fmt: skip
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    check_head(op, hidden, weight, bias, softcap)
    check_labels(op, hidden, weight, labels)
    check_cu_seqlens(op, cu_seqlens, len(hidden), hidden.device)
    sequences = len(cu_seqlens) - 1
    check_ref_log_probs(op, loss, ref_log_probs, sequences, len(hidden), hidden.device)
    if reduction not in ("mean", "token_mean", "sum"):
        raise ValueError(
            f"{op}: reduction must be 'mean', 'token_mean' or 'sum', got {reduction!r}"
        )
    if loss.group > 1 and sequences % loss.group:
        raise ValueError(
            f"{op}: {type(loss).__name__} takes sequences in groups of {loss.group}, "
            f"got {sequences}"
        )
    if not 0 <= skip_below < 1:
        raise ValueError(f"{op}: skip_below must be in [0, 1), got {skip_below}")
    values = sequences // max(loss.group, 1)
    count = {"mean": values, "token_mean": len(hidden), "sum": 1}[reduction]
    step = resolve_chunk_rows(op, Head(weight, bias, softcap, logit_scale), chunk_rows)
    ref_log_probs = None if ref_log_probs is None else ref_log_probs.detach()
    if not torch.is_grad_enabled():  # autograd functions look at requires_grad alone
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    if torch.compiler.is_compiling():
        needs = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
        value, sequence_log_probs, *_ = torch.ops.npo_fast.linear_sequence_loss(
            hidden, weight, bias, labels.long(), cu_seqlens, ref_log_probs,
            _loss_number(loss), softcap, logit_scale, max(count, 1), step, needs,
        )  # fmt: skip
        return value, sequence_log_probs.detach()
    with no_autocast(hidden):
        return _LinearSequenceLoss.apply(
            hidden, weight, bias, labels.long(), cu_seqlens, ref_log_probs,
            loss, softcap, logit_scale, 1.0 / max(count, 1), step, skip_below, skipped,
        )  # fmt: skip


class _LinearSequenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        cu_seqlens: Tensor,
        ref_log_probs: Tensor | None,
        loss: SequenceLoss,
        softcap: float | None,
        logit_scale: float,
        scale: float,
        step: int,
        skip_below: float,
        skipped: Skipped | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, labels, cu_seqlens, ref_log_probs)
        ctx.settings = loss, softcap, logit_scale, scale, step, skip_below
        head = Head(weight, bias, softcap, logit_scale)
        needs = ctx.needs_input_grad[:3]
        if any(needs):
            value, sequence_log_probs, ctx.gradients = _loss_and_gradients(
                head,
                hidden,
                labels,
                cu_seqlens,
                ref_log_probs,
                loss,
                scale,
                step,
                needs,
                skip_below,
                skipped,
            )
        else:
            log_probs = forward_log_probs(head, hidden, labels, step)
            value = loss(log_probs, cu_seqlens, ref_log_probs).sum() * scale
            sequence_log_probs = segment_sum(log_probs, cu_seqlens)
        ctx.mark_non_differentiable(sequence_log_probs)
        return value, sequence_log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # another backward through a retained graph starts anew
            hidden, weight, bias, labels, cu_seqlens, ref_log_probs = ctx.saved_tensors
            loss, softcap, logit_scale, scale, step, skip_below = ctx.settings
            head = Head(weight, bias, softcap, logit_scale)
            needs = ctx.needs_input_grad[:3]
            _, _, gradients = _loss_and_gradients(
                head,
                hidden,
                labels,
                cu_seqlens,
                ref_log_probs,
                loss,
                scale,
                step,
                needs,
                skip_below,
                None,
            )
        return *scale_(gradients, upstream), *([None] * 10)


def _loss_and_gradients(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_log_probs: Tensor | None,
    loss: SequenceLoss,
    scale: float,
    step: int,
    needs: tuple[bool, bool, bool],
    skip_below: float,
    skipped: Skipped | None,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The one pass: loss, sequence log-probs, and gradients of hidden, weight and bias."""
    gradients = HeadGradients(head, hidden, needs, skip_below, skipped)
    buffer = head.buffer(min(step, len(hidden)))
    total = hidden.new_zeros((), dtype=head.wide_dtype)
    sequence_log_probs = total.new_empty(len(cu_seqlens) - 1)
    for rows, sequences, offsets in _chunks(cu_seqlens, loss, len(hidden), step):
        one_pass = rows.stop - rows.start <= step
        if one_pass:
            log_probs, logits_gradient = head.log_probs_and_gradient(
                hidden[rows], labels[rows], buffer
            )
        else:  # the weight g needs the whole group: its log-probs first, its gradient after
            log_probs = forward_log_probs(head, hidden[rows], labels[rows], step)
        ref = _part(ref_log_probs, loss, rows, sequences)
        value, sequence_log_probs[sequences], g = _evaluate(loss, log_probs, offsets, ref)
        total += value
        g = g * scale
        if one_pass:
            gradients.add(rows, hidden[rows], log_probs, logits_gradient, g)
            continue
        for block in blocks(rows, step):
            _, logits_gradient = head.log_probs_and_gradient(hidden[block], labels[block], buffer)
            at = slice(block.start - rows.start, block.stop - rows.start)
            gradients.add(block, hidden[block], log_probs[at], logits_gradient, g[at])
    return total * scale, sequence_log_probs, gradients.finish()


def _chunks(
    cu_seqlens: Tensor, loss: SequenceLoss, rows: int, step: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Whole groups of sequences, as many as fit ``step`` rows: (rows, sequences, offsets)."""
    sequences = len(cu_seqlens) - 1
    group = loss.group or max(sequences, 1)
    if rows <= step or group >= sequences:  # one chunk: nothing to read back from a GPU
        yield slice(0, rows), slice(0, sequences), cu_seqlens
        return
    bounds = cu_seqlens.tolist()
    first = 0
    while first < sequences:
        last = first + group
        while last < sequences and bounds[last + group] - bounds[first] <= step:
            last += group
        offsets = cu_seqlens[first : last + 1] - bounds[first]
        yield slice(bounds[first], bounds[last]), slice(first, last), offsets
        first = last


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


_between_graphs = torch.compiler.disable(linear_sequence_loss)

# Under torch.compile: one opaque operator, whose backward scales the gradients of its forward.
# An operator takes numbers and tensors alone, so a loss goes in as its number in this table.
_numbered: dict[SequenceLoss, int] = {}


@torch.compiler.assume_constant_result
def _loss_number(loss: SequenceLoss) -> int:
    return _numbered.setdefault(loss, len(_numbered))


@torch.library.custom_op("npo_fast::linear_sequence_loss", mutates_args=())
def _operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_log_probs: Tensor | None,
    loss: int,
    softcap: float | None,
    logit_scale: float,
    count: int,  # what the sum over sequences is divided by
    step: int,
    needs: list[bool],  # whether hidden, weight and bias want a gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # loss, (S,), gradients (empty: not wanted)
    op, head = "linear_sequence_loss", Head(weight, bias, softcap, logit_scale)
    check_head(op, hidden, weight, bias, softcap)
    check_labels(op, hidden, weight, labels)
    check_cu_seqlens(op, cu_seqlens, len(hidden), hidden.device)
    loss_object = list(_numbered)[loss]
    with no_autocast(hidden):
        value, sequence_log_probs, gradients = _loss_and_gradients(
            head, hidden, labels, cu_seqlens, ref_log_probs, loss_object, 1 / count, step,
            (needs[0], needs[1], needs[2]), 0.0, None,
        )  # fmt: skip
    grad_hidden, grad_weight, grad_bias = (
        hidden.new_empty(0) if gradient is None else gradient for gradient in gradients
    )
    return value, sequence_log_probs, grad_hidden, grad_weight, grad_bias


@_operator.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor,
    ref_log_probs: Tensor | None, loss: int, softcap: float | None, logit_scale: float,
    count: int, step: int, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    value = hidden.new_empty((), dtype=Head(weight).wide_dtype)
    gradients = (
        torch.empty_like(hidden) if needs[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape) if needs[1] else hidden.new_empty(0),
        bias.new_empty(bias.shape) if needs[2] and bias is not None else hidden.new_empty(0),
    )
    return value, value.new_empty(cu_seqlens.shape[0] - 1), *gradients


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.needs = inputs[-1]


def _scale_gradients(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = (
        gradient * upstream if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return *gradients, *[None] * 9


_operator.register_autograd(_scale_gradients, setup_context=_keep_gradients)
