"""Any loss of sequence log-probabilities with all its gradients, in one pass over the head."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from npo_fast.errors import UserError
from npo_fast.kernels.reference import segment_sum
from npo_fast.kernels.transform import HeadTransform, TransformOptions
from npo_fast.ops import compiled
from npo_fast.ops.checks import (
    check_cu_seqlens,
    check_label_values,
    check_labels,
    check_loss,
    check_ref_log_probs,
    check_ref_values,
    checked_head,
    no_autocast,
)
from npo_fast.ops.gradients import OnePass
from npo_fast.ops.linear_log_probs import linear_log_probs, resolve_chunk_rows
from npo_fast.ops.one_pass import Inputs, LossConfig, SequenceLoss, loss_alone, loss_and_gradients
from npo_fast.ops.skipping import Skipped
from npo_fast.ops.vocab_parallel import VocabularySlice, check_slice, local_head
from npo_fast.tracing import breaks_graph

Reduction = Literal["mean", "token_mean", "sum"]


def _fits_a_graph(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    loss: SequenceLoss,
    *,
    skip_below: float = 0.0,
    vocabulary: VocabularySlice | None = None,
    reduction: str = "mean",
    **_: Any,
) -> bool:
    """Elsewhere the loss is differentiated, or rows are chosen, on the host."""
    in_graph = compiled.IN_GRAPH and hasattr(loss, "value_and_weight") and reduction != "none"
    return in_graph and skip_below == 0 and vocabulary is None


@breaks_graph(unless=_fits_a_graph)
def linear_sequence_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    loss: SequenceLoss,
    *,
    ref_log_probs: Tensor | None = None,  # (S,), or (N,) where the loss wants one a token
    bias: Tensor | None = None,  # (V,)
    reduction: Reduction | Literal["none"] = "mean",
    chunk_rows: int | None = None,
    memory_bytes: int | None = None,
    skip_below: float = 0.0,
    skipped: Skipped | None = None,
    vocabulary: VocabularySlice | None = None,
    **transform: Unpack[TransformOptions],
) -> tuple[Tensor, Tensor]:  # scalar or, unreduced, (S,); (S,)
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
            ``cu_seqlens[i + 1]``. A GPU caller keeps it on the CPU: nothing is read back, where
            more rows than a chunk holds would cost one synchronisation. In a CUDA graph it must
            be on the GPU; it is not read, and more rows than a chunk cost one more forward GEMM.
        loss: ``NPO(beta)`` and siblings, or anything that follows ``SequenceLoss``.
        ref_log_probs: log-probs under the reference model, one a sequence (or one a token).
        bias: (V,) or None.
        reduction: "mean" over the loss's values (one a sequence, or one a pair), "token_mean"
            (their sum / number of tokens), "sum"; "none" returns the values, and since their
            upstream gradients are not known yet, the backward pass makes the logits again (8NDV).
        chunk_rows: rows whose logits are alive at a time; None takes the fastest way of
            ``npo_fast.ops.cost``: all of them where they fit the memory that the weight's gradient
            takes later (N <= D), or are no larger than an fp32 gradient; 0 makes no logits in
            memory at all, for 8NDV flops.
        memory_bytes: the limit on memory beyond inputs, outputs and a few numbers a row, for the
            choice where ``chunk_rows`` is None; None allows an fp32 gradient of the head.
        skip_below: rows whose gradient is bounded by less than this fraction of the largest bound
            in their chunk are left out of the backward GEMMs; 0 is exact. ``Skipped`` has the
            bound. Costs a GPU caller one synchronisation a chunk.
        skipped: filled with the fraction of rows left out and the bounds on the error.
        vocabulary: on several processes, the slice of V whose rows ``weight`` and ``bias`` are. The
            other arguments and the results are the same on all. ``hidden`` gets this slice's part
            of its gradient: ``gather_rows`` adds up the parts.
        softcap: c in ``c * tanh(z / c)`` (Gemma 2), from 1e-30 to 1e30, or None for no cap, the
            default.
        logit_scale: factor on the (capped) logits, by default 1.

    Returns:
        The scalar loss (unreduced, the values of the loss), differentiable once in hidden, weight
        and bias, and the detached log-probs of the sequences, (S,); both fp32 (fp64 for fp64
        inputs).

    Raises:
        UserError: shapes, dtypes, devices, labels or offsets that do not fit together, an
            unknown reduction, or a missing reference.
        UserError: a second derivative, forward mode, or a transform of ``torch.func``.

    ``torch.compile`` takes a loss with ``value_and_weight`` (every one of this package) into its
    graph as one operator; the loss must be hashable, and labels and offsets are checked when the
    graph runs. Any other loss, or ``skip_below``, runs between two graphs: autograd cannot run in
    an operator. So does every loss before PyTorch 2.13.

    Source: NPO (arXiv 2404.05868) equation 3 for the loss; the fusion is this package's.
    """
    op, head_transform = "linear_sequence_loss", HeadTransform(**transform)
    check_loss(op, loss)
    hidden, weight, bias = checked_head(op, hidden, weight, bias, head_transform)
    check_labels(op, hidden, labels, weight)
    check_cu_seqlens(op, cu_seqlens, len(hidden), hidden.device)
    sequences = len(cu_seqlens) - 1
    check_ref_log_probs(op, loss, ref_log_probs, sequences, hidden)
    if reduction not in ("mean", "token_mean", "sum", "none"):
        raise UserError(
            f"{op}: reduction must be 'mean', 'token_mean', 'sum' or 'none', got {reduction!r}"
        )
    if reduction == "none" and (skip_below or vocabulary is not None):
        raise UserError(f"{op}: skip_below and vocabulary need one loss, not reduction='none'")
    if loss.group > 1 and sequences % loss.group:
        raise UserError(
            f"{op}: {type(loss).__name__} takes sequences in groups of {loss.group}, "
            f"got {sequences}"
        )
    if not 0 <= skip_below < 1:
        raise UserError(f"{op}: skip_below must be in [0, 1), got {skip_below}")
    values = sequences // max(loss.group, 1)
    count = {"mean": values, "token_mean": len(hidden), "sum": 1, "none": 1}[reduction]
    if vocabulary is not None:
        check_slice(op, vocabulary, weight)
        if chunk_rows == 0:
            raise UserError(
                f"{op}: chunk_rows=0 makes no logits, and a sliced vocabulary needs them"
            )
    head = local_head(weight, bias, head_transform, vocabulary)
    step = resolve_chunk_rows(op, head, len(hidden), chunk_rows, memory_bytes)
    if step == 0 and skip_below > 0:
        if chunk_rows == 0:
            raise UserError(
                f"{op}: skip_below={skip_below} leaves rows out of a chunk of logits, and "
                "chunk_rows=0 makes none; drop one of the two"
            )
        step = head.chunk_rows()
    ref_log_probs = None if ref_log_probs is None else ref_log_probs.detach()
    if not torch.compiler.is_compiling():
        check_ref_values(op, loss, ref_log_probs)
    if reduction == "none":
        log_probs = linear_log_probs(
            hidden, weight, labels, bias=bias, chunk_rows=step, **transform
        )
        return _values(loss, log_probs, cu_seqlens, ref_log_probs)
    number = compiled.loss_number(loss) if torch.compiler.is_compiling() else -1
    config = LossConfig(loss, head_transform, max(count, 1), step, skip_below, vocabulary)
    inputs = Inputs(hidden, weight, bias, labels.long(), cu_seqlens, ref_log_probs)
    if torch.compiler.is_compiling():
        return compiled.sequence_loss(number, config, inputs)
    check_label_values(op, labels, vocabulary.vocabulary if vocabulary else len(weight))
    with no_autocast(hidden):
        if not any(tensor is not None and tensor.requires_grad for tensor in inputs[:3]):
            return loss_alone(config, inputs)
        again = partial(loss_and_gradients, config)
        compute = partial(again, skipped=skipped)
        return OnePass.apply(op, compute, again, *inputs)


def _values(
    loss: SequenceLoss,
    log_probs: Tensor,  # (N,)
    cu_seqlens: Tensor,
    ref_log_probs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns the differentiable values of ``loss``, and the log-probs of the sequences."""
    cu_seqlens = cu_seqlens.to(log_probs.device)
    values = loss(log_probs, cu_seqlens, ref_log_probs)
    if (value_and_weight := getattr(loss, "value_and_weight", None)) is None:
        return values, segment_sum(log_probs.detach(), cu_seqlens)
    return values, value_and_weight(log_probs.detach(), cu_seqlens, ref_log_probs)[1]
