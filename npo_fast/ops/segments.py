"""Sums over the sequences of a pack, differentiable any number of times and in forward mode."""

from typing import Any

import torch
from torch import Tensor

from npo_fast.kernels import reference


def segment_sum(
    values: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (S,)
    """Returns ``sum(values[cu_seqlens[i]:cu_seqlens[i + 1]])`` for each i; 0 where it is empty.

    Summed in fp64. Offsets rise from 0 to N.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return reference.segment_sum(values, cu_seqlens)
    return _SegmentSum.apply(values, cu_seqlens.to(values.device, torch.int64))


class _SegmentSum(torch.autograd.Function):
    """``torch.segment_reduce`` is differentiable once, and not in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, offsets: Tensor) -> Tensor:
        return reference.segment_sum(values, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        values, offsets = inputs
        ctx.rows = len(values)
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (offsets,) = ctx.saved_tensors
        return upstream.repeat_interleave(offsets.diff(), output_size=ctx.rows), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return _SegmentSum.apply(tangent, *ctx.saved_tensors)
