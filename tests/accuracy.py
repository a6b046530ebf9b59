"""How exact a result has to be: its error against fp64 is at most twice plain PyTorch's."""

import math

import torch
from torch import Tensor

# Units in the last place of fp32 that an error may have beside twice PyTorch's, which is at times
# next to nothing by chance. On a GPU Triton's exp is `ex2.approx`, whose argument is rounded once
# more, and its division `div.full`: two units each, where PyTorch and the interpreter have one.
FREE_ULPS = {"cpu": 4, "cuda": 16}


def free_error(device: str | torch.device) -> float:
    """``FREE_ULPS`` as a relative error."""
    return FREE_ULPS[torch.device(device).type] * torch.finfo(torch.float32).eps


def assert_as_exact(
    got: Tensor,
    plain: Tensor,  # of PyTorch in the same dtype
    exact: Tensor,  # fp64
    name: str = "",
    *,
    order: float = 2,  # of the norm of an error
    least_size: float = 0.0,  # of the numbers whose difference ``exact`` is
    device: str | None = None,  # that computed ``got``, where it has moved since
    truncated: bool = False,  # Triton's interpreter truncates fp32 to bf16, where a GPU rounds
) -> None:
    assert got.shape == exact.shape, (name, got.shape, exact.shape)
    if not exact.numel():
        return
    error, of_plain, size = (
        torch.linalg.vector_norm(x.double(), order).item()
        for x in (got.double() - exact, plain.double() - exact, exact)
    )
    free = free_error(device or got.device)
    if truncated and got.dtype == torch.bfloat16:
        free += torch.finfo(torch.bfloat16).eps
    assert error <= 2 * of_plain + free * max(size, least_size), (
        f"{name or 'result'}: error {error:.3g}, PyTorch's {of_plain:.3g}, size {size:.3g}"
    )


def assert_near(got: Tensor, expected: Tensor, bound: float, name: str = "") -> None:
    """The Frobenius norm of the difference is at most ``bound`` times that of ``expected``."""
    assert got.shape == expected.shape, (name, got.shape, expected.shape)
    difference = (got.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    assert math.isfinite(difference), f"{name or 'result'} is not finite"
    assert difference <= bound * size, f"{name or 'result'}: {difference / size:.3g} > {bound:.3g}"
