"""Log-probabilities of labels under a linear head, without the logits."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from npo_fast.ops.autocast import autocast_inputs, no_autocast
from npo_fast.ops.checks import check_head, check_labels
from npo_fast.ops.head import CHUNK_BYTES, FORWARD_BYTES, Head, HeadGradients


def linear_log_probs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:  # (N,)
    """``log softmax(logit_scale * softcap(W h_n + b))[y_n]`` for every row n.

    Differentiable in ``hidden``, ``weight`` and ``bias`` for any upstream gradient; the backward
    pass recomputes a chunk of logits at a time (8NDV flops in all) and saves nothing V-wide.

    Args:
        hidden: rows that predict a label, (N, D), fp32, bf16, fp16 or fp64.
        weight: the head, (V, D), in the dtype of ``hidden``.
        labels: the token each row predicts, (N,), int64 or int32, in [0, V): already shifted.
        bias: (V,) or None.
        softcap: c in ``c * tanh(z / c)`` (Gemma 2), or None.
        logit_scale: factor on the (capped) logits.
        chunk_rows: rows whose logits are alive at a time; None takes what 96 MiB hold
            (48 MiB in the forward pass).

    Returns:
        (N,) in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes, devices or labels that do not fit together.
    """
    if torch.compiler.is_compiling():
        return _between_graphs(
            hidden, weight, labels, bias=bias, softcap=softcap, logit_scale=logit_scale,
            chunk_rows=chunk_rows,
        )  # fmt: skip
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    check_head("linear_log_probs", hidden, weight, bias, softcap)
    check_labels("linear_log_probs", hidden, weight, labels)
    head = Head(weight, bias, softcap, logit_scale)
    step = resolve_chunk_rows("linear_log_probs", head, chunk_rows)
    with no_autocast(hidden):
        return _LinearLogProbs.apply(
            hidden, weight, bias, labels.long(), softcap, logit_scale, step
        )


# labels are checked and chunks made on the host, where torch.compile cannot follow
_between_graphs = torch.compiler.disable(linear_log_probs)


def resolve_chunk_rows(
    op: str, head: Head, chunk_rows: int | None, chunk_bytes: int = CHUNK_BYTES
) -> int:
    if chunk_rows is None:
        return head.chunk_rows(chunk_bytes)
    if chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows must be at least 1 or None, got {chunk_rows}")
    return chunk_rows


def blocks(rows: slice, step: int) -> list[slice]:
    """``rows`` cut into slices of at most ``step``, as few and as equal as can be."""
    count = rows.stop - rows.start
    pieces = -(-count // step)
    bounds = [rows.start + count * i // pieces for i in range(pieces + 1)] if pieces else []
    return [slice(first, last) for first, last in pairwise(bounds)]


def forward_log_probs(head: Head, hidden: Tensor, labels: Tensor, step: int) -> Tensor:  # (N,)
    """The forward pass alone, a chunk of rows at a time."""
    out = hidden.new_empty(hidden.shape[:1], dtype=head.wide_dtype)
    step = min(step, head.chunk_rows(FORWARD_BYTES), max(1, len(hidden)))
    buffer = head.buffer(step)
    for rows in blocks(slice(0, len(hidden)), step):
        out[rows] = head.log_probs(hidden[rows], labels[rows], buffer)
    return out


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        logit_scale: float,
        step: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.settings = softcap, logit_scale, step
        return forward_log_probs(Head(weight, bias, softcap, logit_scale), hidden, labels, step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        softcap, logit_scale, step = ctx.settings
        head = Head(weight, bias, softcap, logit_scale)
        gradients = HeadGradients(head, hidden, ctx.needs_input_grad[:3])
        buffer = head.buffer(min(step, len(hidden)))
        for rows in blocks(slice(0, len(hidden)), step):
            log_probs, logits_gradient = head.log_probs_and_gradient(
                hidden[rows], labels[rows], buffer
            )
            gradients.add(rows, hidden[rows], log_probs, logits_gradient, g[rows])
        return *gradients.finish(), None, None, None, None
