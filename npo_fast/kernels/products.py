"""Matrix products of half-precision operands that are added up in fp32 memory."""

from functools import cache

import torch
from torch import Tensor

STRIP_BYTES = 32 << 20  # of a product that has to be made before it is added


def add_product_(
    out: Tensor,  # (M, N) fp32, or the dtype of the operands
    a: Tensor,  # (M, K)
    b: Tensor,  # (K, N)
    beta: int,  # 0: out is written, and never read
    alpha: float = 1.0,
) -> None:
    """``out = alpha * a @ b + beta * out``; the product's sums are fp32 whatever the operands.

    8 bytes of ``out`` an element where the library adds in place. Where it does not, the product
    is made a strip at a time; in the dtype of the operands where it knows no other, as on CPUs.
    """
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=beta, alpha=alpha)
        return
    way = wide_product(a.device, a.dtype)
    if way == "addmm" and beta:
        torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, out=out)
        return
    step = max(1, STRIP_BYTES // max(1, out.shape[1] * out.itemsize))
    for to, rows in zip(out.split(step), a.split(step), strict=True):
        product = torch.mm(rows, b) if way == "none" else torch.mm(rows, b, out_dtype=out.dtype)
        if beta:
            to.add_(product, alpha=alpha)
        else:
            torch.mul(product, alpha, out=to)
        del product  # before the next one is made


@cache
def wide_product(device: torch.device, dtype: torch.dtype) -> str:
    """What this PyTorch can do there: "addmm" in place, "mm" alone, or "none", with fp32 results.

    Found out by trying: which one takes ``out_dtype`` has changed from version to version.
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
