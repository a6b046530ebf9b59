"""Matrix products: raw logits, and sums in fp32 memory of half-precision operands."""

from collections.abc import Iterator
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from npo_fast.kernels.layout import empty_logits, spans

STRIP_BYTES = 32 << 20  # of a product that is stored before it is added


def add_product_(
    out: Tensor,  # (M, N) fp32, or the dtype of the operands
    a: Tensor,  # (M, K)
    b: Tensor,  # (K, N)
    beta: int,  # 0: out is written, and never read
    alpha: float = 1.0,
) -> None:
    """Computes ``out = alpha * a @ b + beta * out``, in place, with sums in fp32.

    Moves 8 bytes an element of ``out`` where the library adds in place. Elsewhere the product is
    stored a strip of rows at a time before it is added: in fp32, or in the dtype of the operands
    where PyTorch has no fp32 product of them, as on CPUs.
    """
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=beta, alpha=alpha)
        return
    kind = opmath_product(a.device, a.dtype)
    if kind == "addmm" and beta:
        torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, out=out)
        return
    step = max(1, STRIP_BYTES // max(1, out.shape[1] * out.itemsize))
    for target, rows in zip(out.split(step), a.split(step), strict=True):
        product = torch.mm(rows, b) if kind == "none" else torch.mm(rows, b, out_dtype=out.dtype)
        if beta:
            target.add_(product, alpha=alpha)
        else:
            torch.mul(product, alpha, out=target)
        del product  # before the next one is made


@cache
def opmath_product(device: torch.device, dtype: torch.dtype) -> str:
    """Returns which product this PyTorch has with fp32 results: "addmm", "mm" or "none".

    Each is tried: support of ``out_dtype`` has changed from version to version.
    """
    a = torch.ones(16, 16, device=device, dtype=dtype)
    out = torch.ones(16, 16, device=device)
    products = {
        "addmm": lambda: torch.addmm(out, a, a, out_dtype=out.dtype, out=out),
        "mm": lambda: torch.mm(a, a, out_dtype=out.dtype),
    }
    for name, product in products.items():
        with suppress(RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
            product()
            return name
    return "none"


def linear_(
    out: Tensor,  # (M, N)
    hidden: Tensor,  # (M, K) in the dtype of out
    weight: Tensor,  # (N, K) in the dtype of out
    bias: Tensor | None,  # (N,)
) -> None:
    """Computes ``out = hidden @ weight.T + bias``, in place."""
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias.to(out.dtype), hidden, weight.t(), out=out)


def logits_of_slices(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    dtype: torch.dtype,  # of the product
    step: int,  # columns of a slice
) -> Iterator[tuple[slice, Tensor]]:  # columns, (R, C)
    """Yields slices of the vocabulary and their raw logits, which the next ones overwrite."""
    hidden = hidden.to(dtype)
    buffer = empty_logits(len(hidden), min(step, len(weight)), weight, dtype)
    for columns in spans(len(weight), step):
        logits = buffer[:, : columns.stop - columns.start]
        part_of_bias = None if bias is None else bias[columns]
        linear_(logits, hidden, weight[columns].to(dtype), part_of_bias)
        yield columns, logits
