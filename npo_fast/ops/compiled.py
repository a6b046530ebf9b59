"""``linear_sequence_loss`` under ``torch.compile``: one opaque operator, and one for its backward.

The forward operator computes the gradients and keeps them outside of the graph, under the address
of a small tensor that the graph passes to the backward operator. If they were values of the graph,
scaling them would allocate a second gradient of the head. Operators take only numbers and tensors,
so a loss is passed as its number in a table.
"""

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npo_fast.kernels.layout import empty_gradients, opmath_dtype
from npo_fast.kernels.transform import HeadTransform, schema
from npo_fast.ops.checks import (
    check_cu_seqlens,
    check_label_values,
    check_ref_values,
    no_autocast,
)
from npo_fast.ops.derivatives import no_second_derivative
from npo_fast.ops.gradients import Gradients, dtypes_of, wanted
from npo_fast.ops.one_pass import Inputs, LossConfig, SequenceLoss, loss_and_gradients
from npo_fast.tracing import constant_result

# before, Dynamo cannot pass a frozen dataclass to a function: the loss breaks the graph
IN_GRAPH = torch.__version__[:4] >= "2.13"

_numbered: dict[SequenceLoss, int] = {}
_kept: dict[int, Gradients] = {}  # by the address of their key, as long as that lives


@constant_result
def loss_number(loss: SequenceLoss) -> int:
    """Returns the number of ``loss`` in the table; equal losses share one."""
    return _numbered.setdefault(loss, len(_numbered))


def sequence_loss(
    loss: int,  # its number: PyTorch 2.11 cannot ask for it inside a config
    config: LossConfig,
    inputs: Inputs,
) -> tuple[Tensor, Tensor]:  # scalar, (S,)
    """Returns the loss and the detached log-probs of the sequences, as one node of a graph."""
    needs = [tensor is not None and tensor.requires_grad for tensor in inputs[:3]]
    value, sequence_log_probs, _ = torch.ops.npo_fast.linear_sequence_loss(
        *inputs, loss, config.count, config.chunk_rows, needs, *config.transform
    )
    return value, sequence_log_probs.detach()


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor cu_seqlens, "
    "Tensor? ref_log_probs"
)
# needs: whether hidden, weight and bias want a gradient
_SETTINGS = f"int loss, int count, int chunk_rows, bool[] needs, {schema()}"


@torch.library.custom_op(
    "npo_fast::linear_sequence_loss",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def _operator(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:  # loss, (S,), key of gradients
    op, inputs = "linear_sequence_loss", Inputs(*operands[:6])
    check_label_values(op, inputs.labels, len(inputs.weight))
    check_cu_seqlens(op, inputs.cu_seqlens, len(inputs.hidden), inputs.hidden.device)
    check_ref_values(op, list(_numbered)[operands[6]], inputs.ref_log_probs)
    value, sequence_log_probs, gradients = _evaluate(inputs, *operands[6:])
    return value, sequence_log_probs, _keep(gradients)


@torch.library.custom_op(
    "npo_fast::linear_sequence_loss_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor key, {_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def _backward_operator(
    upstream: Tensor, key: Tensor, *operands: Any
) -> tuple[Tensor, Tensor, Tensor]:  # of hidden, weight and bias; empty: not wanted
    inputs = Inputs(*operands[:6])
    gradients = _kept.pop(key.data_ptr(), None)
    if gradients is None:  # another backward through a retained graph starts anew
        _, _, gradients = _evaluate(inputs, *operands[6:])
    return gradients.times(upstream, dtypes_of(inputs[:3]))


def _evaluate(
    inputs: Inputs, loss: int, count: int, chunk_rows: int, needs: list[bool], *transform: Any
) -> tuple[Tensor, Tensor, Gradients]:
    config = LossConfig(list(_numbered)[loss], HeadTransform(*transform), count, chunk_rows)
    with no_autocast(inputs.hidden):
        return loss_and_gradients(config, needs, inputs)


def _keep(gradients: Gradients) -> Tensor:  # (1,) on the CPU
    """Returns a key; when the graph frees it without a backward pass, the gradients go too."""
    memory = np.zeros(1, np.int64)
    key = torch.from_numpy(memory)  # owns memory, and dies with it
    _kept[key.data_ptr()] = gradients
    weakref.finalize(memory, _kept.pop, key.data_ptr(), None)
    return key


@_operator.register_fake
def _(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(*operands[:6])
    value = inputs.hidden.new_empty((), dtype=opmath_dtype(inputs.weight.dtype))
    key = torch.empty(1, dtype=torch.int64, device="cpu")
    return value, value.new_empty(inputs.cu_seqlens.shape[0] - 1), key


@_backward_operator.register_fake
def _(upstream: Tensor, key: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, needs = Inputs(*operands[:6]), operands[9]
    return empty_gradients(inputs.hidden, inputs.weight, inputs.bias, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], *inputs[:6])
    ctx.settings = inputs[6:]
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.settings[3]
    gradients = _backward_operator(upstream, *ctx.saved_tensors, *ctx.settings)
    return *wanted(gradients, needs), None, None, None, *[None] * len(ctx.settings)


def _differentiate_again(*_: Any) -> Any:
    raise no_second_derivative("linear_sequence_loss")


_operator.register_autograd(_differentiate, setup_context=_save)
_backward_operator.register_autograd(_differentiate_again)
