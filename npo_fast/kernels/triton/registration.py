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

# by operator: the launcher (in the module of its name) and what it is told besides
LAUNCHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "row_log_probs_": ("row_log_probs", {"in_place": True}),
    "npo_head": ("npo_head", {}),
    "row_kl_": ("row_kl", {}),
    "linear_log_probs": ("linear_forward", {}),
    "linear_log_probs_backward": ("linear_backward", {}),
}


def kernel(operator: str) -> Callable[..., Any]:
    """Launches Triton for what it serves and the reference for the rest."""
    plain, _ = reference.OPERATORS[operator]
    launcher, options = LAUNCHERS[operator]

    def launch(*arguments: Any) -> Any:
        if not _triton_serves(arguments):
            return plain(*arguments)
        module = import_module(f"npo_fast.kernels.triton.{launcher}")
        with torch.cuda.device_of(arguments[0]):
            return getattr(module, launcher)(*arguments, **options)

    return launch


def _triton_serves(arguments: tuple[Any, ...]) -> bool:
    """fp64 (gradcheck) and rows that are not contiguous are not worth a kernel of their own."""
    tensors = [one for one in arguments if isinstance(one, Tensor)]
    return tensors[0].dtype != torch.float64 and all(
        one.stride(-1) == 1 for one in tensors if one.dim() == 2
    )


for _operator in LAUNCHERS:
    reference.library.impl(_operator, kernel(_operator), KEY)
