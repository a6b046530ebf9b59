"""Matrix products of half-precision operands that are added up in fp32 memory."""

from functools import cache

import torch
from torch import Tensor

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
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
        return "addmm"
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        pass
    try:
        torch.mm(a, a, out_dtype=torch.float32)
        return "mm"
    except (RuntimeError, TypeError):
        return "none"
