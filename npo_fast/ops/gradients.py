"""Gradients of hidden states, weight and bias of a head: their memory, and GEMMs 2 and 3."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from npo_fast.kernels import layout
from npo_fast.kernels.layout import column_stride, empty_gradients, in_huge_pages
from npo_fast.kernels.products import add_product_
from npo_fast.ops import cost
from npo_fast.ops.derivatives import first_derivative
from npo_fast.ops.head import Head

Needs = Sequence[bool]  # whether hidden, weight and bias want a gradient
Gradients = tuple[Tensor, Tensor, Tensor]  # of hidden, weight and bias; empty where not wanted


class OnePass(torch.autograd.Function):
    """A loss whose forward pass computes the gradients of hidden, weight and bias too.

    ``compute(needs, tensors)`` returns the loss, other results without gradient, and the gradients
    times ``scale``. Another backward through a retained graph calls ``again`` in its place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: str,  # for messages
        compute: Callable[[Needs, Sequence[Any]], Any],
        again: Callable[[Needs, Sequence[Any]], Any],
        scale: float,
        *tensors: Tensor | None,  # hidden, weight, bias, and what else ``compute`` takes
    ) -> Any:
        ctx.op, ctx.again, ctx.scale = op, again, scale
        ctx.save_for_backward(*tensors)
        loss, *others, ctx.gradients = compute(ctx.needs_input_grad[4:7], tensors)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[4:7]

        def compute() -> tuple[Tensor | None, ...]:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                *_, gradients = ctx.again(needs, ctx.saved_tensors)
            scale_(gradients, upstream, ctx.scale)
            return wanted(gradients, needs)

        operands = ctx.saved_tensors[:3] if torch.is_grad_enabled() else ()
        gradients = first_derivative(ctx.op, compute, upstream, *operands)
        others = [None] * (len(ctx.needs_input_grad) - 7)
        return None, None, None, None, *gradients, *others


class HeadGradients:
    """Gradients of hidden, weight and bias, summed over chunks in a fixed order.

    The gradient of the weight is written last, so ``logits`` can be a view of its memory: where all
    rows are one chunk, GEMM 3 goes straight into the weight's dtype and replaces the logits strip
    by strip. Where several chunks add up in fp32, the logits lie in the finished gradient instead.
    """

    def __init__(self, head: Head, hidden: Tensor, needs: Needs, chunk_rows: int) -> None:
        self.head, self.rows = head, len(hidden)
        rows = min(chunk_rows, self.rows)
        self.hidden = None
        if needs[0]:  # the rows that pad the last chunk included
            length = head.padded(rows) if rows == self.rows else self.rows + head.padded(1) - 1
            self.hidden = hidden.new_empty(length, hidden.shape[1])
        self.weight: Tensor | None = None  # the products add up in it
        self.finished: Tensor | None = None  # in the dtype of the parameter, where that is another
        self.strips: list[slice] = []  # of the vocabulary, where logits lie in self.weight
        self.beta = 0  # the first chunk overwrites: a pass of zeros over the head is not cheap
        # (padded rows, V), for the logits of one chunk after another
        self.logits = self._logits_in_gradient(rows) if needs[1] else head.buffer(rows)
        self.bias = None
        if head.bias is not None and needs[2]:
            self.bias = head.bias.new_zeros(head.bias.shape, dtype=head.opmath_dtype)

    def _logits_in_gradient(self, rows: int) -> Tensor:  # (padded rows, V)
        """Allocates the gradient of the weight; returns memory for logits, in it if they fit."""
        head, weight = self.head, self.head.weight
        (vocabulary, width), single = weight.shape, rows == self.rows
        dtype = head.logits_dtype if single else head.opmath_dtype
        stride = column_stride(rows, layout.runs_on_cpu(weight))
        fits = 0 < stride <= width
        ahead = 0  # elements by which the gradient's memory begins before the logits need it to
        if single and fits:
            ahead = width * cost.strip_rows(vocabulary, width, dtype.itemsize)
            self.strips = strips(vocabulary, width, stride, ahead)
        memory = in_huge_pages(weight.new_empty(vocabulary * width + ahead, dtype=dtype))
        self.weight = memory[: vocabulary * width].view(vocabulary, width)
        if fits and not single and weight.dtype == head.logits_dtype != dtype:
            self.finished = weight.new_empty(weight.shape)
            memory = self.finished.view(-1)
        elif not self.strips:
            return head.buffer(rows)
        end = memory[len(memory) - vocabulary * stride :]
        return end.view(vocabulary, stride)[:, : head.padded(rows)].t()

    def set_hidden(
        self,
        rows: slice,  # of the chunk
        logits_gradient: Tensor,  # (padded R, V), or of the K rows that are kept
        alpha: float = 1.0,
        kept: Tensor | None = None,  # (K,) row numbers in the chunk; others have no gradient
    ) -> None:
        """GEMM 2: ``d_hidden[rows] = alpha * logits_gradient @ weight``.

        Rows that pad this chunk are overwritten by the next, and cut off from the last.
        """
        if self.hidden is None:
            return
        padded = len(logits_gradient)
        if kept is None and self.hidden.dtype == logits_gradient.dtype:
            out = self.hidden[rows.start : rows.start + padded]
            self.head.hidden_gradient(logits_gradient, out, alpha)
            return
        product = logits_gradient.new_empty(padded, self.hidden.shape[1])
        self.head.hidden_gradient(logits_gradient, product, alpha)
        if kept is None:
            self.hidden[rows] = product[: rows.stop - rows.start]
        else:
            self.hidden[rows] = 0
            product = product[: len(kept)].to(self.hidden.dtype)
            self.hidden[rows].index_copy_(0, kept, product)

    def add_weight(
        self,
        logits_gradient: Tensor,  # (padded R, V) in self.logits; strips of d_weight overwrite it
        hidden: Tensor,  # (R, D) rows of this chunk
        alpha: float = 1.0,
    ) -> None:
        """GEMM 3: ``d_weight += alpha * logits_gradient.T @ hidden``; d_bias gets the sum of rows.

        The last use of ``logits_gradient``.
        """
        if self.bias is not None:
            total = logits_gradient.sum(dim=0, dtype=self.bias.dtype)
            self.bias.add_(total, alpha=alpha)
        if self.weight is None:
            return
        operand = self.head.operand(hidden)
        by_column = logits_gradient.t()
        for columns in self.strips:
            self.weight[columns].addmm_(by_column[columns], operand, beta=0, alpha=alpha)
        if not self.strips:
            add_product_(self.weight, by_column, operand, self.beta, alpha)
        self.beta = 1

    def finish(self) -> Gradients:
        """Returns the gradients in the dtypes of their parameters."""
        weight, bias = self.head.weight, self.head.bias
        d_hidden, d_weight, d_bias = empty_gradients(weight, weight, bias, (False, False, False))
        if self.hidden is not None:
            d_hidden = self.hidden[: self.rows]
        if self.weight is not None:
            if self.beta == 0:  # no rows at all
                self.weight.zero_()
            d_weight = self.weight if self.finished is None else self.finished.copy_(self.weight)
        if self.bias is not None:
            d_bias = self.bias.to(d_bias.dtype)
        return d_hidden, d_weight.to(weight.dtype), d_bias


def strips(vocabulary: int, width: int, stride: int, ahead: int) -> list[slice]:
    """Cuts the vocabulary so that no strip of the gradient reaches logits still to be read.

    Rows [0, s) of the gradient, ``width`` elements each, begin ``ahead`` elements before the memory
    that ends with the logits, ``stride`` elements a token. Where rows are fewer than the width the
    first strip is most of the vocabulary.
    """
    slices, first = [], 0
    while first < vocabulary:
        count = (ahead + (vocabulary - first) * (width - stride)) // width
        if count > cost.GOOD_ROWS:
            count -= count % cost.GOOD_ROWS  # whole tiles of a GEMM
        last = min(first + count, vocabulary)
        slices.append(slice(first, last))
        first = last
    return slices


def wanted(gradients: Gradients, needs: Needs) -> tuple[Tensor | None, ...]:
    """Returns the gradients as autograd takes them, with None for those that are not wanted."""
    return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True))


def gradient_scale(dtype: torch.dtype, count: int) -> float:
    """Returns the factor on gradients until the backward pass knows the upstream one.

    It is 1 but in fp16: there the gradient of a mean over many tokens would leave the range before
    a loss scale could keep it in. A power of two rounds nothing; at most 256 leaves the
    gradient of the head, a sum over rows, below the largest number.
    """
    return float(min(256, 1 << (count.bit_length() - 1))) if dtype == torch.float16 else 1.0


def scale_(gradients: Gradients, upstream: Tensor, scale: float = 1.0) -> None:
    """Multiplies gradients that carry the factor ``scale`` by ``upstream / scale``, in place.

    In place, autograd keeps these buffers instead of copies. A factor of 1 costs nothing.
    """
    factor = upstream if scale == 1.0 else upstream / scale
    for gradient in gradients:
        if gradient.numel():
            torch.ops.npo_fast.scale_(gradient, factor)
