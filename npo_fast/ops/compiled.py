"""``linear_sequence_loss`` under ``torch.compile``: one opaque operator.

Its forward computes the gradients, its backward scales them. An operator takes numbers and tensors
alone, so a loss goes in as its number in a table.
"""

from typing import Any

import torch
from torch import Tensor

from npo_fast.kernels.reference import empty_gradients
from npo_fast.ops.autocast import no_autocast
from npo_fast.ops.checks import check_cu_seqlens, check_label_values
from npo_fast.ops.head import Head, held_factor, or_empty
from npo_fast.ops.one_pass import Inputs, Plan, SequenceLoss, loss_and_gradients

# in between Dynamo cannot hand a frozen dataclass to a function: there the loss breaks the graph
IN_GRAPH = not "2.11" <= torch.__version__[:4] < "2.13"

_numbered: dict[SequenceLoss, int] = {}


@torch.compiler.assume_constant_result
def loss_number(loss: SequenceLoss) -> int:
    return _numbered.setdefault(loss, len(_numbered))


def sequence_loss(
    loss: int,  # its number: PyTorch 2.11 cannot ask for it inside a plan
    plan: Plan,
    inputs: Inputs,
) -> tuple[Tensor, Tensor]:  # scalar, (S,)
    needs = [t is not None and t.requires_grad for t in inputs[:3]]
    value, sequence_log_probs, *_ = torch.ops.npo_fast.linear_sequence_loss(
        *inputs, loss,
        plan.softcap, plan.logit_scale, plan.count, plan.chunk_rows, needs,
    )  # fmt: skip
    return value, sequence_log_probs.detach()


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
    count: int,
    chunk_rows: int,
    needs: list[bool],  # whether hidden, weight and bias want a gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # loss, (S,), gradients (empty: not wanted)
    op = "linear_sequence_loss"
    check_label_values(op, labels, len(weight))
    check_cu_seqlens(op, cu_seqlens, len(hidden), hidden.device)
    plan = Plan(list(_numbered)[loss], softcap, logit_scale, count, chunk_rows)
    with no_autocast(hidden):
        value, sequence_log_probs, gradients = loss_and_gradients(
            plan,
            (needs[0], needs[1], needs[2]),
            Inputs(hidden, weight, bias, labels, cu_seqlens, ref_log_probs),
        )
    return value, sequence_log_probs, *or_empty(gradients, hidden, weight, bias)


@_operator.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    value = hidden.new_empty((), dtype=Head(weight).wide_dtype)
    gradients = empty_gradients(hidden, weight, bias, rest[-1])
    return value, value.new_empty(cu_seqlens.shape[0] - 1), *gradients


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.needs = inputs[-1]
    ctx.held = held_factor(inputs[1].dtype, inputs[9])


def _scale_gradients(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = (
        gradient * (upstream / ctx.held) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return *gradients, *[None] * 9


_operator.register_autograd(_scale_gradients, setup_context=_keep_gradients)
