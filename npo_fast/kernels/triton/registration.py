"""The operators' GPU kernels. ROCm uses the same dispatch key.

Triton is imported by the first call, not by ``import npo_fast``.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from npo_fast.kernels import reference

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
    """Launches Triton for what it serves and the reference for the rest."""
    plain, _ = reference.OPERATORS[operator]
    module_name, launcher = LAUNCHERS[operator]

    def launch(*arguments: Any) -> Any:
        if not _triton_serves(arguments, operator in ANY_STRIDES):
            return plain(*arguments)
        module = import_module(f"npo_fast.kernels.triton.{module_name}")
        with torch.cuda.device_of(arguments[0]):
            return getattr(module, launcher)(*arguments)

    return launch


def _triton_serves(arguments: tuple[Any, ...], any_strides: bool) -> bool:
    """fp64 (gradcheck) and operands whose rows are not contiguous are not worth a kernel."""
    tensors = [one for one in arguments if isinstance(one, Tensor)]
    return tensors[0].dtype != torch.float64 and (
        any_strides or all(one.stride(-1) == 1 for one in tensors if one.dim() == 2)
    )


for _operator in LAUNCHERS:
    reference.library.impl(_operator, kernel(_operator), KEY)
