"""``linear_sequence_loss`` under ``torch.compile``: one opaque operator, and one for its backward.

The forward operator computes the gradients and keeps them outside of the graph, under the address
of an empty tensor that the graph hands to the backward operator. A graph that held them would have
to make a second gradient of the head to scale the first. An operator takes numbers and tensors
alone, so a loss goes in as its number in a table.
"""

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npo_fast.kernels.layout import empty_gradients
from npo_fast.ops.autocast import no_autocast
from npo_fast.ops.checks import check_cu_seqlens, check_label_values
from npo_fast.ops.head import Gradients, Head, Needs, held_factor, or_empty, scale_
from npo_fast.ops.one_pass import Inputs, Plan, SequenceLoss, loss_and_gradients

# in between Dynamo cannot hand a frozen dataclass to a function: there the loss breaks the graph
IN_GRAPH = not "2.11" <= torch.__version__[:4] < "2.13"

_numbered: dict[SequenceLoss, int] = {}
_kept: dict[int, Gradients] = {}  # by the address of their key, as long as that lives


@torch.compiler.assume_constant_result
def loss_number(loss: SequenceLoss) -> int:
    return _numbered.setdefault(loss, len(_numbered))


def sequence_loss(
    loss: int,  # its number: PyTorch 2.11 cannot ask for it inside a plan
    plan: Plan,
    inputs: Inputs,
) -> tuple[Tensor, Tensor]:  # scalar, (S,)
    needs = [t is not None and t.requires_grad for t in inputs[:3]]
    value, sequence_log_probs, _ = torch.ops.npo_fast.linear_sequence_loss(
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
) -> tuple[Tensor, Tensor, Tensor]:  # loss, (S,), the key of the gradients
    op = "linear_sequence_loss"
    check_label_values(op, labels, len(weight))
    check_cu_seqlens(op, cu_seqlens, len(hidden), hidden.device)
    inputs = Inputs(hidden, weight, bias, labels, cu_seqlens, ref_log_probs)
    value, sequence_log_probs, gradients = _evaluate(
        inputs, loss, softcap, logit_scale, count, chunk_rows, (needs[0], needs[1], needs[2])
    )
    return value, sequence_log_probs, _keep(gradients)


@torch.library.custom_op("npo_fast::linear_sequence_loss_backward", mutates_args=())
def _backward_operator(
    upstream: Tensor,
    key: Tensor,
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
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # of hidden, weight and bias; empty: not wanted
    gradients = _kept.pop(key.data_ptr(), None)
    if gradients is None:  # another backward through a retained graph starts anew
        inputs = Inputs(hidden, weight, bias, labels, cu_seqlens, ref_log_probs)
        _, _, gradients = _evaluate(
            inputs, loss, softcap, logit_scale, count, chunk_rows, (needs[0], needs[1], needs[2])
        )
    scale_(gradients, upstream, held_factor(weight.dtype, count))
    return or_empty(gradients, hidden, weight, bias)


def _evaluate(
    inputs: Inputs,
    loss: int,
    softcap: float | None,
    logit_scale: float,
    count: int,
    chunk_rows: int,
    needs: Needs,
) -> tuple[Tensor, Tensor, Gradients]:
    plan = Plan(list(_numbered)[loss], softcap, logit_scale, count, chunk_rows)
    with no_autocast(inputs.hidden):
        return loss_and_gradients(plan, needs, inputs)


def _keep(gradients: Gradients) -> Tensor:  # (1,) on the CPU
    """A key for them; when the graph lets go of it without a backward pass they go too."""
    memory = np.zeros(1, np.int64)
    key = torch.from_numpy(memory)  # owns memory, and dies with it
    _kept[key.data_ptr()] = gradients
    weakref.finalize(memory, _kept.pop, key.data_ptr(), None)
    return key


@_operator.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, labels: Any, cu_seqlens: Tensor, *rest: Any) -> (
    tuple[Tensor, Tensor, Tensor]
):  # fmt: skip
    value = hidden.new_empty((), dtype=Head(weight).opmath_dtype)
    key = torch.empty(1, dtype=torch.int64, device="cpu")
    return value, value.new_empty(cu_seqlens.shape[0] - 1), key


@_backward_operator.register_fake
def _(upstream: Tensor, key: Tensor, hidden: Tensor, weight: Tensor, bias: Any, *rest: Any) -> (
    tuple[Tensor, Tensor, Tensor]
):  # fmt: skip
    return empty_gradients(hidden, weight, bias, rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, loss, softcap, logit_scale, count, chunk_rows, needs = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.settings = loss, softcap, logit_scale, count, chunk_rows, needs
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.settings[-1]
    gradients = _backward_operator(upstream, *ctx.saved_tensors, *ctx.settings)
    wanted = (one if needed else None for one, needed in zip(gradients, needs, strict=True))
    return *wanted, *[None] * 9


_operator.register_autograd(_differentiate, setup_context=_save)
