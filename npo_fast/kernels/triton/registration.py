"""The operators' GPU kernels. ROCm uses the same dispatch key.

Triton is imported by the first call, not by ``import npo_fast``.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from npo_fast.kernels.operators import OPERATORS, library
from npo_fast.kernels.transform import takes_numbers

KEY = "CUDA"

# by operator: the module of its launcher, and the launcher
LAUNCHERS: dict[str, tuple[str, str]] = {
    "row_log_probs": ("row_log_probs", "row_log_probs"),
    "row_gradient_": ("row_log_probs", "row_gradient"),
    "label_logits": ("label_logits", "label_logits"),
    "npo_head": ("npo_head", "npo_head"),
    "row_kl_": ("row_kl", "row_kl"),
    "scale_": ("scale", "scale"),
    "linear_log_probs": ("linear", "linear_forward"),
    "linear_log_probs_backward": ("linear", "linear_backward"),
}
ANY_STRIDES = ("row_log_probs", "row_gradient_", "row_kl_", "scale_")


def kernel(operator: str) -> Callable[..., Any]:
    """Returns what serves ``operator``: Triton where it can, and the reference for the rest."""
    plain, _ = OPERATORS[operator]

    @cache
    def launcher() -> Callable[..., Any]:
        module_name, function = LAUNCHERS[operator]
        module = import_module(f"npo_fast.kernels.triton.{module_name}")
        return takes_numbers(getattr(module, function))

    def launch(*arguments: Any) -> Any:
        if not _triton_serves(arguments, operator in ANY_STRIDES):
            return plain(*arguments)
        with torch.cuda.device_of(arguments[0]):
            return launcher()(*arguments)

    return launch


def _triton_serves(arguments: tuple[Any, ...], any_strides: bool) -> bool:
    """fp64 (gradcheck) and operands whose rows are not contiguous are not worth a kernel."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    return tensors[0].dtype != torch.float64 and (
        any_strides or all(tensor.stride(-1) == 1 for tensor in tensors if tensor.dim() == 2)
    )


for _operator in LAUNCHERS:
    library.impl(_operator, kernel(_operator), KEY)
