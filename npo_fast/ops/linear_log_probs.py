"""Log-probabilities of labels under a linear head, without the logits."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from npo_fast.errors import UserError
from npo_fast.kernels.layout import empty_gradients, empty_per_row
from npo_fast.kernels.transform import HeadTransform, TransformOptions, schema
from npo_fast.ops.checks import check_label_values, check_labels, checked_head, no_autocast
from npo_fast.ops.derivatives import no_second_derivative
from npo_fast.ops.gradients import HeadGradients, dtypes_of, wanted
from npo_fast.ops.head import Head


def linear_log_probs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    chunk_rows: int | None = None,
    **transform: Unpack[TransformOptions],
) -> Tensor:  # (N,)
    """``log softmax(logit_scale * softcap(W h_n + b))[y_n]`` for every row n.

    Differentiable once in ``hidden``, ``weight`` and ``bias`` for any upstream gradient; the
    backward pass recomputes a chunk of logits at a time (8NDV flops in all) and saves nothing
    V-wide.
    ``torch.compile`` takes it into its graph and checks the labels when the graph runs.

    Args:
        hidden, weight, labels, bias, softcap, logit_scale: as in ``linear_sequence_loss``.
        chunk_rows: rows whose logits are alive at a time in the backward pass; None takes the
            fastest way of ``npo_fast.ops.cost``; 0 makes none. The forward pass never has more
            than a tile of 32 MiB.

    Returns:
        (N,) in fp32 (fp64 for fp64 inputs).

    Raises:
        UserError: shapes, dtypes, devices or labels that do not fit together.
        UserError: a second derivative, forward mode, or a transform of ``torch.func``.
    """
    op = "linear_log_probs"
    head_transform = HeadTransform(**transform)
    hidden, weight, bias = checked_head(op, hidden, weight, bias, head_transform)
    check_labels(op, hidden, labels, weight)
    step = resolve_chunk_rows(op, Head(weight, bias), len(hidden), chunk_rows)
    log_probs, _ = _forward(hidden, weight, bias, labels.long(), step, *head_transform)
    return log_probs


def resolve_chunk_rows(
    op: str, head: Head, count: int, chunk_rows: int | None, memory_bytes: int | None = None
) -> int:
    """Returns the rows of a chunk for ``count`` rows; 0: operators that make no logits."""
    if chunk_rows is None:
        return head.problem(count, head.weight.requires_grad).choose(memory_bytes).chunk_rows
    if chunk_rows < 0:
        raise UserError(
            f"{op}: chunk_rows must be at least 1, 0 for no logits, or None, got {chunk_rows}"
        )
    return chunk_rows


def split_rows(rows: slice, step: int) -> list[slice]:
    """Cuts ``rows`` into slices of at most ``step``, as few and as equal as can be.

    Where ``step`` is a multiple of 64 all but the last are: what a GPU likes rows to begin at.
    """
    count = rows.stop - rows.start
    if count == 0:
        return []
    pieces = -(-count // step)
    unit = 64 if step % 64 == 0 else 1
    size = -(-count // (pieces * unit)) * unit
    firsts = range(rows.start, rows.stop, size)
    return [slice(first, min(first + size, rows.stop)) for first in firsts]


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"


@torch.library.custom_op(
    "npo_fast::log_probs_of_rows",
    mutates_args=(),
    schema=f"({_HEAD}, int chunk_rows, {schema()}) -> (Tensor, Tensor)",
)
def _forward(*operands: Any) -> tuple[Tensor, Tensor]:
    """Returns log_probs (N,), and lse (N,) or, where the backward pass has chunks, nothing."""
    hidden, weight, bias, labels, chunk_rows, *transform = operands
    check_label_values("linear_log_probs", labels, len(weight))
    with no_autocast(hidden):
        log_probs, lse = torch.ops.npo_fast.linear_log_probs(
            hidden, weight, labels, bias, *transform
        )
    return log_probs, lse if chunk_rows == 0 else lse.new_empty(0)


@_forward.register_fake
def _(hidden: Tensor, weight: Any, bias: Any, labels: Any, chunk_rows: int, *_: Any) -> Any:
    log_probs = empty_per_row(hidden)
    return log_probs, log_probs.new_empty(0 if chunk_rows else hidden.shape[0])


@torch.library.custom_op(
    "npo_fast::log_probs_of_rows_backward",
    mutates_args=(),
    schema=f"(Tensor g, {_HEAD}, Tensor log_probs, Tensor lse, bool[] needs, int chunk_rows, "
    f"{schema()}) -> (Tensor, Tensor, Tensor)",
)
def _backward(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    g, hidden, weight, bias, labels, log_probs, lse, needs, chunk_rows, *transform = operands
    with no_autocast(hidden):
        if chunk_rows == 0:
            return torch.ops.npo_fast.linear_log_probs_backward(
                g, hidden, weight, labels, bias, log_probs, lse, *transform, needs
            )
        head = Head(weight, bias, HeadTransform(*transform))
        gradients = HeadGradients(head, hidden, needs, chunk_rows)
        for rows in split_rows(slice(0, len(hidden)), chunk_rows):
            h = hidden[rows]
            logits, softmax = head.logits_and_softmax(h, labels[rows], gradients.logits)  # GEMM 1
            g_rows = gradients.scaled(g[rows], softmax.log_probs[: rows.stop - rows.start])
            head.differentiate_(logits, softmax, g_rows)
            gradients.set_hidden(rows, logits)  # GEMM 2
            gradients.add_weight(logits, h)  # GEMM 3
        return gradients.finish().times(g.new_ones(()), dtypes_of((hidden, weight, bias)))


@_backward.register_fake
def _(g: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    return empty_gradients(hidden, weight, bias, needs=rest[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.settings = inputs[4:]  # chunk_rows and the transform
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = _backward(g, *ctx.saved_tensors, needs, *ctx.settings)
    return *wanted(gradients, needs), None, *[None] * len(ctx.settings)


def _differentiate_again(*_: Any) -> Any:
    raise no_second_derivative("linear_log_probs")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_differentiate_again)
