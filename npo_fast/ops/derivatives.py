"""Which derivatives the operators have: first ones, by the backward pass, and no others.

A gradient that was computed ahead, or by a kernel, has no graph of its own. Left alone, autograd
would take it for a constant in a second derivative, and a dual number for one without a tangent.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from npo_fast.errors import UserError
from npo_fast.tracing import breaks_graph

CURE = (
    "write the logits out in plain PyTorch where you need it, "
    "(hidden @ weight.T).float().log_softmax(-1)"
)


def check_derivatives(op: str, *tensors: Tensor | None) -> None:
    """Raises UserError for operands with tangents and inside the transforms of ``torch.func``."""
    if not torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        _check_now(op, *tensors)


@breaks_graph()  # neither can be asked in a graph
def _check_now(op: str, *tensors: Tensor | None) -> None:
    if torch._C._are_functorch_transforms_active():
        raise UserError(
            f"{op} has a backward pass for torch.autograd.grad and .backward() alone, none for "
            f"torch.func (grad, vjp, jvp, hessian, vmap): {CURE}"
        )
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise UserError(f"{op} has no forward-mode derivative: {CURE}")


def first_derivative(op: str, compute: Callable[[], Any], *tensors: Tensor | None) -> Any:
    """Returns ``compute()``, gradients that depend on ``tensors``.

    Under ``create_graph`` they are part of the graph, and raise where they are differentiated.
    """
    return _FirstDerivative.apply(op, compute, *tensors)


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, compute: Callable[[], Any], *tensors: Tensor | None) -> Any:
        ctx.op = op
        return compute()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise no_second_derivative(ctx.op)


def no_second_derivative(op: str) -> UserError:
    """The error of whoever differentiates a gradient of ``op``."""
    return UserError(f"{op} can be differentiated once, not twice: {CURE}")
