"""Gradients of hidden states, weight and bias of a head: their memory, and GEMMs 2 and 3."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npo_fast.kernels import layout
from npo_fast.kernels.layout import (
    column_stride,
    empty_gradients,
    in_huge_pages,
    opmath_dtype,
    power_of_two,
)
from npo_fast.kernels.products import add_product_
from npo_fast.ops import cost
from npo_fast.ops.derivatives import first_derivative
from npo_fast.ops.head import Head

Needs = Sequence[bool]  # whether hidden, weight and bias want a gradient
Dtypes = Sequence[torch.dtype | None]  # of hidden, weight and bias
Unit = Tensor | float  # a stored number times its unit is the number


FP16_SIZE = 64.0  # of the largest gradient of a logit: hidden states of 500 times that fit fp16


class Gradients(NamedTuple):
    """Gradients of hidden, weight and bias, empty where not wanted, until the upstream is known.

    fp16 has no room for them before that: hidden and bias are then in fp32, and the weight's (as
    much memory as all else) in fp16 with a unit that fits them.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    weight_unit: Unit = 1.0
    hidden_unit: Unit = 1.0  # the bias's too

    def times(self, upstream: Tensor, dtypes: Dtypes) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients, times ``upstream``, in the dtypes of their parameters.

        In place where the dtype stays, so that autograd keeps these buffers instead of copies. A
        factor of 1 costs nothing.
        """
        hidden, weight, bias = (
            _times(values, upstream, unit, dtype)
            for values, unit, dtype in zip(
                self[:3],
                (self.hidden_unit, self.weight_unit, self.hidden_unit),
                dtypes,
                strict=True,
            )
        )
        return hidden, weight, bias


def _times(values: Tensor, upstream: Tensor, unit: Unit, dtype: torch.dtype | None) -> Tensor:
    factor = upstream if isinstance(unit, float) and unit == 1.0 else upstream * unit
    if torch._C._functorch.is_legacy_batchedtensor(factor):  # of ``is_grads_batched``
        values = values * factor.to(values.dtype)
    elif values.numel():
        torch.ops.npo_fast.scale_(values, factor)
    return values if dtype is None else values.to(dtype)


def dtypes_of(tensors: Sequence[Tensor | None]) -> Dtypes:
    """Returns the dtype of each tensor."""
    return [None if tensor is None else tensor.dtype for tensor in tensors]


class OnePass(torch.autograd.Function):
    """A loss whose forward pass computes the gradients of hidden, weight and bias too.

    ``compute(needs, tensors)`` returns the loss, other results without gradient, and the gradients.
    Another backward through a retained graph calls ``again`` in its place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: str,  # for messages
        compute: Callable[[Needs, Sequence[Any]], Any],
        again: Callable[[Needs, Sequence[Any]], Any],
        *tensors: Tensor | None,  # hidden, weight, bias, and what else ``compute`` takes
    ) -> Any:
        ctx.op, ctx.again, ctx.dtypes = op, again, dtypes_of(tensors[:3])
        ctx.save_for_backward(*tensors)
        loss, *others, ctx.gradients = compute(ctx.needs_input_grad[3:6], tensors)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:6]

        def compute() -> tuple[Tensor | None, ...]:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                *_, gradients = ctx.again(needs, ctx.saved_tensors)
            return wanted(gradients.times(upstream, ctx.dtypes), needs)

        operands = ctx.saved_tensors[:3] if torch.is_grad_enabled() else ()
        gradients = first_derivative(ctx.op, compute, upstream, *operands)
        others = [None] * (len(ctx.needs_input_grad) - 6)
        return None, None, None, *gradients, *others


class HeadGradients:
    """Gradients of hidden, weight and bias, summed over chunks in a fixed order.

    The gradient of the weight is written last, so ``logits`` can be a view of its memory: where all
    rows are one chunk, GEMM 3 goes straight into the weight's dtype and replaces the logits strip
    by strip. Where several chunks add up in fp32, the logits lie in the finished gradient instead.

    The gradient of the logits carries a unit, so that products of any size fit fp16: ``scaled``
    fits it to the rows that come. That of the weight is the largest so far.
    """

    def __init__(
        self, head: Head, hidden: Tensor, needs: Needs, chunk_rows: int, unit: float = 1.0
    ) -> None:
        self.head, self.rows = head, len(hidden)
        self.is_fp16 = head.weight.dtype == torch.float16
        # the unit of the gradient of the logits: a factor of the GEMMs, or in fp16 kept apart
        self.alpha = 1.0 if self.is_fp16 else unit
        self.unit: Unit = unit if self.is_fp16 else 1.0
        # fp16 stores a mean over rows, of which the largest is about FP16_SIZE: no sum overflows
        self.weight_alpha = FP16_SIZE / power_of_rows(self.rows) if self.is_fp16 else unit
        rows = min(chunk_rows, self.rows)
        self.hidden = None
        if needs[0]:  # the rows that pad the last chunk included
            length = head.padded(rows) if rows == self.rows else self.rows + head.padded(1) - 1
            dtype = opmath_dtype(hidden.dtype) if self.is_fp16 else hidden.dtype
            self.hidden = hidden.new_empty(length, hidden.shape[1], dtype=dtype)
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

    def scaled(
        self,
        g: Tensor,  # (R,) factors of the rows to come
        log_probs: Tensor | None = None,  # (R,) of their labels
    ) -> Tensor:
        """Returns ``g`` in a unit that makes the largest gradient in fp16 about ``FP16_SIZE``.

        That of row n is at most ``|g_n| (1 - p_n)``, times the slope of the head's transform. What
        adds up already is changed to the new unit where that is larger.
        """
        if not self.is_fp16 or not len(g):
            return g
        size = g.abs() if log_probs is None else g.abs() * -torch.expm1(log_probs)
        largest = power_of_two(size.max()) * (self.head.transform.largest_slope / FP16_SIZE)
        if isinstance(self.unit, Tensor):
            largest = torch.maximum(largest, self.unit)
            if self.weight is not None:
                torch.ops.npo_fast.scale_(self.weight, self.unit / largest)
        self.unit, self.weight_alpha = largest, 1 / power_of_rows(self.rows)
        return g / largest

    def set_hidden(
        self,
        rows: slice,  # of the chunk
        logits_gradient: Tensor,  # (padded R, V), or of the K rows that are kept
        kept: Tensor | None = None,  # (K,) row numbers in the chunk; others have no gradient
    ) -> None:
        """GEMM 2: ``d_hidden[rows] = logits_gradient @ weight``, times the unit.

        Rows that pad this chunk are overwritten by the next, and cut off from the last.
        """
        if self.hidden is None:
            return
        padded, dtype = len(logits_gradient), logits_gradient.dtype
        if self.is_fp16:
            dtype = self.hidden.dtype
        in_place = kept is None and self.hidden.dtype == dtype
        if in_place:
            product = self.hidden[rows.start : rows.start + padded]
        else:
            product = self.hidden.new_empty(padded, self.hidden.shape[1], dtype=dtype)
        self.head.hidden_gradient(logits_gradient, product, self.alpha)
        if self.is_fp16:
            product.mul_(self.unit)
        if kept is not None:
            self.hidden[rows] = 0
            product = product[: len(kept)].to(self.hidden.dtype)
            self.hidden[rows].index_copy_(0, kept, product)
        elif not in_place:
            self.hidden[rows] = product[: rows.stop - rows.start]

    def add_weight(
        self,
        logits_gradient: Tensor,  # (padded R, V) in self.logits; strips of d_weight overwrite it
        hidden: Tensor,  # (R, D) rows of this chunk
    ) -> None:
        """GEMM 3: ``d_weight += logits_gradient.T @ hidden``; d_bias gets the sum of rows.

        The last use of ``logits_gradient``.
        """
        if self.bias is not None:
            total = logits_gradient.sum(dim=0, dtype=self.bias.dtype).mul_(self.unit)
            self.bias.add_(total, alpha=self.alpha)
        if self.weight is None:
            return
        operand = self.head.operand(hidden)
        by_column, alpha = logits_gradient.t(), self.weight_alpha
        for columns in self.strips:
            self.weight[columns].addmm_(by_column[columns], operand, beta=0, alpha=alpha)
        if not self.strips:
            add_product_(self.weight, by_column, operand, self.beta, alpha)
        self.beta = 1

    def finish(self) -> Gradients:
        """Returns the gradients, in the dtypes of their parameters but for fp16."""
        weight, bias = self.head.weight, self.head.bias
        d_hidden, d_weight, d_bias = empty_gradients(weight, weight, bias, (False, False, False))
        if self.hidden is not None:
            d_hidden = self.hidden[: self.rows]
        if self.weight is not None:
            if self.beta == 0:  # no rows at all
                self.weight.zero_()
            d_weight = self.weight if self.finished is None else self.finished.copy_(self.weight)
        if self.bias is not None:
            d_bias = self.bias
        unit = self.unit / self.weight_alpha if self.is_fp16 else 1.0
        return Gradients(d_hidden, d_weight.to(weight.dtype), d_bias, unit)


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


def wanted(gradients: Sequence[Tensor], needs: Needs) -> tuple[Tensor | None, ...]:
    """Returns the gradients as autograd takes them, with None for those that are not wanted."""
    return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True))


def power_of_rows(rows: int) -> float:
    """Returns the power of two at or above ``rows``."""
    return float(1 << max(rows - 1, 0).bit_length())
