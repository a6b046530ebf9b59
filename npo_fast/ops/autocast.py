"""Autocast for the fused operators: they take part like ``torch.nn.functional.linear``."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# known beforehand: torch.compile of PyTorch 2.11 cannot ask
WITH_AUTOCAST = frozenset(
    one for one in ("cpu", "cuda", "xpu", "mps", "meta") if torch.amp.is_autocast_available(one)
)


def autocast_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs in autocast's dtype where it is on; gradients flow back through the casts."""
    device = hidden.device.type
    if device not in WITH_AUTOCAST or hidden.dtype == torch.float64:
        return hidden, weight, bias
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Inside the operators dtypes are chosen GEMM by GEMM, and fp32 sums must stay fp32."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if device in WITH_AUTOCAST else nullcontext()
