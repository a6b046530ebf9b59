"""KL divergence of one linear head from another, with all its gradients, in one pass."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from npo_fast.errors import UserError
from npo_fast.kernels.layout import opmath_dtype, pad_rows
from npo_fast.kernels.transform import (
    LARGEST,
    HeadTransform,
    PairedTransformOptions,
    paired_transforms,
)
from npo_fast.ops import cost
from npo_fast.ops.checks import (
    check_device,
    check_label_values,
    check_labels,
    checked_head,
    no_autocast,
)
from npo_fast.ops.derivatives import first_derivative
from npo_fast.ops.gradients import (
    Gradients,
    HeadGradients,
    Needs,
    OnePass,
    dtypes_of,
    wanted,
)
from npo_fast.ops.head import Head
from npo_fast.ops.linear_log_probs import split_rows
from npo_fast.ops.vocab_parallel import VocabularySlice, check_slice, local_head
from npo_fast.tracing import breaks_graph

SLAB_LOGITS = 1 << 20  # of a chunk that is capped, a few columns at a time


@breaks_graph()  # labels are checked and chunks made on the host
def linear_kl(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (N, D')
    ref_weight: Tensor,  # (V, D')
    *,
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    labels: Tensor | None = None,  # (N,)
    demotion: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk_rows: int | None = None,
    vocabulary: VocabularySlice | None = None,
    **transforms: Unpack[PairedTransformOptions],
) -> Tensor:  # scalar or, unreduced, (N,)
    """``reduce_n KL(p_ref_n || p_n)`` from hidden states and heads, a chunk of logits at a time.

        z_n    = logit_scale * softcap(W h_n + b),       p_n     = softmax(z_n)
        zref_n = ref_logit_scale * ref_softcap(W_ref href_n + b_ref) - demotion * onehot(y_n)
        KL_n   = sum_v p_ref_n (log p_ref_n - log p_n),  p_ref_n = softmax(zref_n)
        dKL_n / dz_n = p_n - p_ref_n

    The reference needs no model in memory: its hidden states and its head are enough. The forward
    pass computes the gradients too, with both chunks of logits side by side (6NDV + 2ND'V flops).
    With ``labels`` the reference is taken to like them less by ``demotion``: the target of UNDIAL.

    Args:
        hidden, weight, bias, softcap, logit_scale: as in ``linear_sequence_loss``.
        ref_hidden: the same rows under the reference, (N, D'), in the dtype of ``hidden``.
        ref_weight: the reference's head, (V, D'), in the same dtype.
        ref_bias, ref_softcap, ref_logit_scale: as those of the model.
        labels: the tokens to demote, (N,), int64 or int32, in [0, V); None demotes nothing.
        demotion: nats that the reference's logit of each label is lowered by, 0 or more.
        reduction: "mean" over rows, or "sum"; "none" returns that of each row, (N,), and its
            backward pass makes the logits again.
        chunk_rows: rows whose logits are alive at a time; None takes the fastest way of
            ``npo_fast.ops.cost``, and what 96 MiB hold of the reference's.
        vocabulary: on several processes, the slice of V whose rows both weights and biases are.
            ``hidden``, ``ref_hidden`` and ``labels`` are then those of all processes, and so is the
            result; the gradient of ``hidden`` is this slice's, which ``gather_rows`` sums.

    Returns:
        A scalar (unreduced, a number a row), fp32 (fp64 for fp64 inputs), differentiable once in
        hidden, weight and bias. The reference is a constant.

    Raises:
        UserError: shapes, dtypes, devices or labels that do not fit together, an unknown
            reduction, or a demotion without labels.
        UserError: a second derivative, forward mode, or a transform of ``torch.func``.

    Source: KL on retain data as in NPO (arXiv 2404.05868, section 2); UNDIAL, arXiv 2402.10052.
    """
    op = "linear_kl"
    transform, ref_transform = paired_transforms(**transforms)
    hidden, weight, bias = checked_head(op, hidden, weight, bias, transform)
    ref_hidden, ref_weight, ref_bias = checked_head(
        op, ref_hidden, ref_weight, ref_bias, ref_transform, prefix="ref_", constant=True
    )
    _check_pair(op, hidden, weight, ref_hidden, ref_weight)
    if vocabulary is not None:
        check_slice(op, vocabulary, weight)
    if labels is not None:
        check_labels(op, hidden, labels, weight)
        check_label_values(op, labels, vocabulary.vocabulary if vocabulary else len(weight))
        labels = labels.long()
    if not 0 <= demotion <= LARGEST or (demotion and labels is None):
        raise UserError(
            f"{op}: demotion must be 0 or more, at most {LARGEST:g}, and comes with labels, got "
            f"{demotion}"
            f"{' without labels' if labels is None else ''}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise UserError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    scale = 1.0 / max(len(hidden), 1) if reduction == "mean" else 1.0
    if chunk_rows is not None and chunk_rows < 1:
        raise UserError(f"{op}: chunk_rows must be at least 1 or None, got {chunk_rows}")
    if vocabulary is not None and reduction == "none":
        raise UserError(f"{op}: a sliced vocabulary needs one loss, not reduction='none'")
    settings = (transform, ref_transform), demotion, vocabulary
    tensors = hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels
    if reduction == "none":
        with no_autocast(hidden):
            return _RowKL.apply(*settings, chunk_rows, *tensors)
    compute = partial(_kl_and_gradients, *settings, scale, chunk_rows)
    with no_autocast(hidden):
        (loss,) = OnePass.apply(op, compute, compute, *tensors)
    return loss


def _kl_and_gradients(
    transforms: tuple[HeadTransform, HeadTransform],
    demotion: float,
    vocabulary: VocabularySlice | None,
    scale: float,  # factor on the sum over rows
    chunk_rows: int | None,
    needs: Needs,
    tensors: Sequence[Any],
    upstream: Tensor | None = None,  # (N,) factors on the gradient of each row
) -> tuple[Tensor, Gradients]:
    """Returns the scaled sum of KL over rows, and the gradients of hidden, weight and bias."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels = tensors
    head = local_head(weight, bias, transforms[0], vocabulary)
    ref_head = local_head(ref_weight, ref_bias, transforms[1], vocabulary)
    if chunk_rows is None and needs[1]:
        problem = replace(head.problem(len(hidden), True), makes_logits=True)
        chunk_rows = problem.choose().chunk_rows
    step = chunk_rows or head.chunk_rows(cost.CHUNK_BYTES // 2)  # two share the budget
    gradients = HeadGradients(head, hidden, needs, step, unit=scale)
    total = hidden.new_zeros((), dtype=torch.float64)
    for rows, kl, logits in divergences(  # GEMM 1 of either head; logits <- d kl / d logits
        head, hidden, ref_head, ref_hidden, step, labels, demotion, gradients.logits
    ):
        total += kl.sum(dtype=torch.float64)
        if upstream is not None:
            logits[: len(kl)] *= gradients.scaled(upstream[rows]).unsqueeze(1)
        logits[len(kl) :] = 0  # of the rows that pad the chunk
        gradients.set_hidden(rows, logits)  # GEMM 2
        gradients.add_weight(logits, hidden[rows])  # GEMM 3
    return (total * scale).to(head.opmath_dtype), gradients.finish()


class _RowKL(torch.autograd.Function):
    """The KL of each row; the backward pass makes both logits again, a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        transforms: tuple[HeadTransform, HeadTransform],
        demotion: float,
        vocabulary: None,
        chunk_rows: int | None,
        *tensors: Any,
    ) -> Tensor:  # (N,)
        ctx.transforms, ctx.demotion, ctx.chunk_rows = transforms, demotion, chunk_rows
        ctx.save_for_backward(*tensors)
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels = tensors
        head, ref_head = (
            Head(weight, bias, transforms[0]),
            Head(ref_weight, ref_bias, transforms[1]),
        )
        divided = divergences(head, hidden, ref_head, ref_hidden, chunk_rows, labels, demotion)
        empty = hidden.new_empty(0, dtype=head.opmath_dtype)
        return torch.cat([empty, *(kl for _, kl, _ in divided)])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs, tensors = ctx.needs_input_grad[4:7], ctx.saved_tensors

        def compute() -> tuple[Tensor | None, ...]:
            with no_autocast(upstream):
                _, gradients = _kl_and_gradients(
                    ctx.transforms,
                    ctx.demotion,
                    None,
                    1.0,
                    ctx.chunk_rows,
                    needs,
                    tensors,
                    upstream,
                )
                one = upstream.new_ones(())
                return wanted(gradients.times(one, dtypes_of(tensors[:3])), needs)

        gradients = first_derivative("linear_kl", compute, upstream, *tensors[:3])
        return None, None, None, None, *gradients, None, None, None, None


def divergences(
    head: Head,
    hidden: Tensor,  # (N, D)
    ref_head: Head,
    ref_hidden: Tensor,  # (N, D')
    chunk_rows: int | None = None,
    labels: Tensor | None = None,  # (N,)
    demotion: float = 0.0,
    buffer: Tensor | None = None,  # (R, V) for the logits of a chunk
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields rows, their KL (R,) and its gradient in the raw logits (padded R, V).

    The next chunk reuses the memory of the gradient.

    The reference's logits are made for fewer rows at a time where a chunk has many: rows do not
    depend on each other, and only the model's gradient is wanted for all of them.
    """
    ref_step = ref_head.chunk_rows()
    step = chunk_rows or min(head.chunk_rows(cost.CHUNK_BYTES // 2), ref_step)
    ref_step = min(step, ref_step)
    if buffer is None:
        buffer = head.buffer(min(step, len(hidden)))
    ref_buffer = ref_head.buffer(min(ref_step, len(hidden)))
    for rows in split_rows(slice(0, len(hidden)), step):
        logits = head.logits(hidden[rows], buffer)
        lse_of_rows = head.begin_lse(logits, head.transform)  # on its way during the next GEMM
        lse: Tensor | None = None
        kls = []
        for part in split_rows(rows, ref_step):
            ref_logits = ref_head.logits(ref_hidden[part], ref_buffer)
            ref_transform = ref_head.transform
            if labels is not None and demotion:
                ref_transform = _demote_(ref_head, ref_logits, labels[part], demotion)
            part_logits = logits[part.start - rows.start :][: len(ref_logits)]
            transforms = *head.transform, *ref_transform
            ref_lse = ref_head.begin_lse(ref_logits, ref_transform)()
            if part.start == rows.start:
                lse = lse_of_rows()
            part_lse = None if lse is None else lse[part.start - rows.start :][: len(ref_logits)]
            kl = torch.ops.npo_fast.row_kl_(part_logits, ref_logits, *transforms, part_lse, ref_lse)
            kls.append(kl[: part.stop - part.start])
        yield rows, head.sum_over_ranks(torch.cat(kls)), logits


def _demote_(
    head: Head,
    logits: Tensor,  # (padded R, V) raw
    labels: Tensor,  # (R,)
    demotion: float,
) -> HeadTransform:
    """Lowers ``z`` at the labels, in place; returns the transform still to be applied."""
    transform, scale = head.transform, head.transform.scale
    column, mine = head.localize(pad_rows(labels, len(logits)))
    # a capped logit minus the demotion may lie below the cap; a small scale would need raw logits
    # that fp16 does not hold
    if scale is None or demotion > 1e3 * abs(scale):
        opmath = opmath_dtype(logits.dtype)
        for slab in logits.t().split(max(1, SLAB_LOGITS // max(1, len(labels)))):
            slab.copy_(transform.apply(slab.to(opmath)))
        transform, scale = HeadTransform(), 1.0
    at_label = logits.gather(1, column.unsqueeze(1))
    lowered = torch.where(mine.unsqueeze(1), at_label - demotion / scale, at_label)
    logits.scatter_(1, column.unsqueeze(1), lowered)
    return transform


def _check_pair(
    op: str, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> None:
    if len(ref_hidden) != len(hidden) or len(ref_weight) != len(weight):
        raise UserError(
            f"{op}: the reference must have the rows and the vocabulary of the model, got "
            f"ref_hidden {tuple(ref_hidden.shape)} for hidden {tuple(hidden.shape)} and "
            f"ref_weight {tuple(ref_weight.shape)} for weight {tuple(weight.shape)}"
        )
    if ref_hidden.dtype != hidden.dtype:
        raise UserError(
            f"{op}: model and reference must have one dtype, got {hidden.dtype} and "
            f"{ref_hidden.dtype}"
        )
    check_device(op, "hidden", hidden, "ref_hidden", ref_hidden)
