"""Sums over sequences that lie end to end."""

import torch
from torch import Tensor


def segment_sum(
    values: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (S,)
    """``out[i] = sum(values[cu_seqlens[i]:cu_seqlens[i + 1]])``; an empty sequence sums to 0.

    Summed in fp64: one number a row costs nothing, and beta times its error goes into every g.
    """
    offsets = cu_seqlens.to(values.device, torch.int64)
    sums = torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0, unsafe=True)
    return sums.to(values.dtype)
