"""The operators' GPU kernels. ROCm uses the same dispatch key.

Triton is imported by the first call, not by ``import npo_fast``.
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from npo_fast.kernels import reference
from npo_fast.kernels.operators import library
from npo_fast.kernels.transform import HeadTransform, takes_numbers

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
    plain = getattr(reference, operator)
    module_name, launcher = LAUNCHERS[operator]

    @takes_numbers
    @wraps(plain)
    def launch(*arguments: Any) -> Any:
        if not _triton_serves(arguments, operator in ANY_STRIDES):
            return plain(*arguments)
        module = import_module(f"npo_fast.kernels.triton.{module_name}")
        with torch.cuda.device_of(arguments[0]):
            return getattr(module, launcher)(*arguments)

    return launch


def _triton_serves(arguments: tuple[Any, ...], any_strides: bool) -> bool:
    """Whether it is worth a kernel, and ``math.activate`` knows all settings of the transform.

    fp64 (gradcheck) and operands whose rows are not contiguous are not worth one.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    transforms = [argument for argument in arguments if isinstance(argument, HeadTransform)]
    return (
        tensors[0].dtype != torch.float64
        and (any_strides or all(t.stride(-1) == 1 for t in tensors if t.dim() == 2))
        and all(HeadTransform(t.softcap, t.logit_scale) == t for t in transforms)
    )


for _operator in LAUNCHERS:
    library.impl(_operator, kernel(_operator), KEY)
