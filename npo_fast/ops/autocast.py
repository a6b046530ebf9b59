"""Autocast for the fused operators: they follow it as ``torch.nn.functional.linear`` does."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# computed at import: torch.compile of PyTorch 2.11 cannot ask
DEVICES = ("cpu", "cuda", "xpu", "mps", "meta")
WITH_AUTOCAST = frozenset(name for name in DEVICES if torch.amp.is_autocast_available(name))


def autocast_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the inputs in autocast's dtype where it is on; gradients pass through the casts."""
    device = hidden.device.type
    if device not in WITH_AUTOCAST or hidden.dtype == torch.float64:
        return hidden, weight, bias
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Returns a context without autocast on the device of ``tensor``.

    The operators choose the dtype of each GEMM, and fp32 sums must stay fp32.
    """
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if device in WITH_AUTOCAST else nullcontext()
