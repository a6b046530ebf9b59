"""The LM head, a chunk of rows at a time: the three GEMMs and the row kernels around them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import npo_fast.kernels  # noqa: F401  (declares the operators)
from npo_fast.kernels import layout
from npo_fast.kernels.layout import column_stride, empty_gradients, empty_logits, padded_rows
from npo_fast.kernels.pages import in_huge_pages
from npo_fast.kernels.products import add_product_
from npo_fast.ops import cost
from npo_fast.ops.cost import Problem
from npo_fast.ops.skipping import Skipped, compact_, rows_that_matter

UPCAST_BYTES = 16 << 20  # fp32 copy of a slice of a half-precision weight, on the CPU

Needs = tuple[bool, bool, bool]  # whether hidden, weight and bias want a gradient
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight and bias


class Softmax(NamedTuple):
    """What is known of each row of a chunk, those that pad it too.

    ``softmax(z) = exp(z - shift) * share``.
    """

    log_probs: Tensor  # (R,) of the labels
    labels: Tensor  # (R,)
    shift: Tensor  # (R,)
    share: Tensor  # (R,)

    def of_rows(self, rows: Tensor, padded: int) -> "Softmax":
        return Softmax(*(pad_rows(one[rows], padded) for one in self))


@dataclass(frozen=True)
class Head:
    """``z = logit_scale * softcap(weight @ h + bias)`` and what has to be known to evaluate it."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def logits_dtype(self) -> torch.dtype:
        """That of the products: half precision where the processor has instructions for it."""
        return layout.product_dtype(self.weight)

    @property
    def opmath_dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

    def problem(self, rows: int, trains_head: bool) -> Problem:
        """The cost model's view of so many rows."""
        vocabulary, width = self.weight.shape
        return Problem(
            rows, width, vocabulary,
            itemsize=self.logits_dtype.itemsize, opmath_itemsize=self.opmath_dtype.itemsize,
            trains_head=trains_head, on_cpu=layout.runs_on_cpu(self.weight),
        )  # fmt: skip

    def chunk_rows(self, chunk_bytes: int | None = None) -> int:
        """Rows whose logits fit ``chunk_bytes`` (None: ``cost.CHUNK_BYTES``), at least one."""
        return self.problem(0, False).rows_of_bytes(chunk_bytes or cost.CHUNK_BYTES)

    def padded(self, rows: int) -> int:
        return padded_rows(rows, layout.runs_on_cpu(self.weight))

    def buffer(self, rows: int) -> Tensor:  # (padded rows, V)
        """Room for the logits of one chunk after another.

        A buffer a chunk would keep two alive at a time, and the CPU would map in each page anew.
        """
        return empty_logits(self.padded(rows), len(self.weight), self.weight, self.logits_dtype)

    def operand(self, hidden: Tensor) -> Tensor:  # (R, D) -> (padded R, D) in the logits' dtype
        more = self.padded(len(hidden)) - len(hidden)
        hidden = hidden.to(self.logits_dtype)
        return F.pad(hidden, (0, 0, 0, more)) if more else hidden

    def logits(
        self, hidden: Tensor, buffer: Tensor
    ) -> Tensor:  # (R, D) -> (padded R, V) raw, before softcap and scale
        hidden = self.operand(hidden)
        logits = buffer[: len(hidden)]
        for columns, weight in self._weight_tiles():
            if self.bias is None:
                torch.mm(hidden, weight.t(), out=logits[:, columns])
            else:
                bias = self.bias[columns].to(hidden.dtype)
                torch.addmm(bias, hidden, weight.t(), out=logits[:, columns])
        return logits

    def activate(self, logits: Tensor) -> Tensor:  # (R, V) raw -> z, in the wide dtype
        z = logits.to(self.opmath_dtype)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z * self.logit_scale

    def log_probs(self, hidden: Tensor, labels: Tensor) -> Tensor:  # (N, D), (N,) -> (N,)
        log_probs, _ = torch.ops.npo_fast.linear_log_probs(
            hidden, self.weight, labels, self.bias, self.softcap, self.logit_scale
        )
        return log_probs

    def softmax(
        self, logits: Tensor, hidden: Tensor, labels: Tensor
    ) -> Softmax:  # (padded R, V) raw logits of (R, D)
        target = self._target_logits(hidden, labels, len(logits))
        labels = pad_rows(labels, len(logits))
        log_probs, _, shift, share = torch.ops.npo_fast.row_log_probs(
            logits, labels, target, self.softcap, self.logit_scale
        )
        return Softmax(log_probs, labels, shift, share)

    def differentiate_(self, logits: Tensor, softmax: Softmax, g: Tensor) -> None:
        """Logits <- the gradient in them of a loss with derivative g (R,) in the log-probs.

        Rows that pad the chunk become zero.
        """
        torch.ops.npo_fast.row_gradient_(
            logits, softmax.labels, softmax.log_probs, softmax.shift, softmax.share,
            pad_rows(g, len(logits)), self.softcap, self.logit_scale,
        )  # fmt: skip

    def hidden_gradient(
        self, logits_gradient: Tensor, out: Tensor, alpha: float
    ) -> None:  # (R, V), (R, D)
        for columns, weight in self._weight_tiles():
            beta = int(columns.start > 0)
            out.addmm_(logits_gradient[:, columns], weight, beta=beta, alpha=alpha)

    def _target_logits(self, hidden: Tensor, labels: Tensor, padded: int) -> Tensor | None:
        """Raw target logits from an fp32 dot, where the chunk itself is rounded to half."""
        if self.logits_dtype == self.opmath_dtype:
            return None
        found = torch.ops.npo_fast.label_logits(hidden, self.weight, labels, self.bias)
        return pad_rows(found, padded)

    def _weight_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in ``logits_dtype``: itself, or one converted slice of rows after another."""
        vocabulary, width = self.weight.shape
        if self.weight.dtype == self.logits_dtype:
            yield slice(0, vocabulary), self.weight
            return
        step = max(1, UPCAST_BYTES // (width * self.logits_dtype.itemsize))
        for first in range(0, vocabulary, step):
            columns = slice(first, min(first + step, vocabulary))
            yield columns, self.weight[columns].to(self.logits_dtype)


def pad_rows(values: Tensor, rows: int) -> Tensor:  # (R,) -> (rows,), with zeros
    return F.pad(values, (0, rows - len(values))) if rows > len(values) else values


class HeadGradients:
    """Gradients of hidden, weight and bias, summed over chunks in a fixed order.

    The gradient of the weight is written last, so logits can lie in its memory: where all rows are
    one chunk, GEMM 3 goes straight into the weight's dtype and takes the place of the logits, strip
    by strip. Where several chunks add up in fp32, the logits lie in the finished gradient instead.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        needs: Needs,
        chunk_rows: int,
        skip_below: float = 0.0,
        skipped: Skipped | None = None,
    ) -> None:
        self.head, self.rows = head, len(hidden)
        self.skip_below, self.skipped = skip_below, skipped
        rows = min(chunk_rows, self.rows)
        self.hidden = None
        if needs[0]:  # with room for the rows that pad the last chunk
            room = head.padded(rows) if rows == self.rows else self.rows + head.padded(1) - 1
            self.hidden = hidden.new_empty(room, hidden.shape[1])
        self.weight: Tensor | None = None  # what the products add up in
        self.finished: Tensor | None = None  # in the dtype of the parameter, where that is another
        self.strips: list[slice] = []  # of the vocabulary, where logits lie in self.weight
        self.beta = 0  # the first chunk overwrites: a pass of zeros over the head is not cheap
        # (padded rows, V)
        self.logits = self._in_gradient(rows) if needs[1] else head.buffer(rows)
        self.bias = None
        if head.bias is not None and needs[2]:
            self.bias = head.bias.new_zeros(head.bias.shape, dtype=head.opmath_dtype)

    def _in_gradient(self, rows: int) -> Tensor:  # (padded rows, V)
        """Allocates the gradient of the weight, and finds room for the logits of a chunk."""
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

    def add(
        self,
        rows: slice,
        hidden: Tensor,  # (R, D) the rows of this chunk
        logits: Tensor,  # (padded R, V) raw, in self.logits
        softmax: Softmax,
        g: Tensor,  # (R,) d loss / d log_prob
        alpha: float = 1.0,  # times which g is meant
    ) -> None:
        """``d_hidden = alpha G W``, ``d_weight += alpha G^T hidden``; G replaces the logits."""
        kept = None
        if self.skip_below > 0:
            scale = self.head.logit_scale * alpha
            log_probs = softmax.log_probs[: len(g)]
            kept = rows_that_matter(hidden, log_probs, g, scale, self.skip_below, self.skipped)
        if kept is not None:
            compact_(logits, kept)
            logits = self.logits[: self.head.padded(len(kept))]
            softmax = softmax.of_rows(kept, len(logits))
            hidden, g = hidden[kept], g[kept]
        self.head.differentiate_(logits, softmax, g)
        self.add_products(rows, hidden, alpha, kept)

    def add_products(
        self,
        rows: slice,
        hidden: Tensor,  # (R, D), or (K, D) where fewer are kept
        alpha: float,
        kept: Tensor | None = None,  # (K,) rows of the chunk
    ) -> None:
        """What the gradient in ``self.logits`` adds, times ``alpha``."""
        count = len(hidden)
        logits_gradient = self.logits[: self.head.padded(count)]
        logits_gradient[count:] = 0  # of a divergence, padding has some
        if self.bias is not None:
            total = logits_gradient.sum(dim=0, dtype=self.bias.dtype)
            self.bias.add_(total, alpha=alpha)
        if self.hidden is not None:
            self._set_hidden(self.hidden, rows, logits_gradient, alpha, count, kept)
        if self.weight is not None:
            operand = self.head.operand(hidden)
            of_columns = logits_gradient.t()
            for columns in self.strips:
                self.weight[columns].addmm_(of_columns[columns], operand, beta=0, alpha=alpha)
            if not self.strips:
                add_product_(self.weight, of_columns, operand, self.beta, alpha)
        self.beta = 1

    def _set_hidden(
        self,
        d_hidden: Tensor,  # (N, D), a few rows more where chunks are padded
        rows: slice,
        logits_gradient: Tensor,  # (padded rows of a chunk, V)
        alpha: float,
        count: int,  # rows that are not padding
        kept: Tensor | None,
    ) -> None:
        """Rows that pad this chunk are overwritten by the next, and cut off from the last."""
        padded = len(logits_gradient)
        direct = kept is None and d_hidden.dtype == logits_gradient.dtype
        out = d_hidden[rows.start : rows.start + padded]
        made = out if direct else logits_gradient.new_empty(padded, d_hidden.shape[1])
        self.head.hidden_gradient(logits_gradient, made, alpha)
        if kept is not None:
            d_hidden[rows] = 0
            d_hidden[rows].index_copy_(0, kept, made[:count].to(d_hidden.dtype))
        elif not direct:
            d_hidden[rows] = made[:count]

    def finish(self) -> Gradients:
        """The gradients in the dtypes of their parameters."""
        weight, bias = self.weight, self.bias
        if weight is not None and self.beta == 0:  # no rows at all
            weight.zero_()
        if weight is not None and self.finished is not None:
            weight = self.finished.copy_(weight)
        return (
            None if self.hidden is None else self.hidden[: self.rows],
            None if weight is None else weight.to(self.head.weight.dtype),
            None if bias is None or self.head.bias is None else bias.to(self.head.bias.dtype),
        )


def strips(vocabulary: int, width: int, stride: int, ahead: int) -> list[slice]:
    """Slices of the vocabulary whose gradient never reaches logits that are still to be read.

    Rows [0, s) of the gradient, ``width`` elements each, begin ``ahead`` elements before the memory
    that ends with the logits, ``stride`` elements a token. Where rows are fewer than the width the
    first strip is most of the vocabulary.
    """
    found, first = [], 0
    while first < vocabulary:
        count = (ahead + (vocabulary - first) * (width - stride)) // width
        if count > cost.GOOD_ROWS:
            count -= count % cost.GOOD_ROWS  # whole tiles of a GEMM
        last = min(first + count, vocabulary)
        found.append(slice(first, last))
        first = last
    return found


def or_empty(
    gradients: Gradients, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What an operator returns, which knows no None."""
    nothing = empty_gradients(hidden, weight, bias, (False, False, False))
    d_hidden, d_weight, d_bias = (
        empty if one is None else one for one, empty in zip(gradients, nothing, strict=True)
    )
    return d_hidden, d_weight, d_bias


def held_factor(dtype: torch.dtype, count: int) -> float:
    """What gradients are multiplied by until the backward pass knows the upstream one.

    Formed at scale 1, the gradient of a mean over many tokens would leave the range of fp16 before
    a loss scale could keep it there. A power of two rounds nothing; at most 256 leaves the
    gradient of the head, a sum over rows, below the largest number.
    """
    return float(min(256, 1 << (count.bit_length() - 1))) if dtype == torch.float16 else 1.0


def scale_(gradients: Gradients, upstream: Tensor, held: float = 1.0) -> Gradients:
    """In place: autograd then keeps these buffers instead of copies.

    The gradients are ``held`` times what they are to be. A factor of 1 costs nothing.
    """
    factor = upstream if held == 1.0 else upstream / held
    for one in gradients:
        if one is not None:
            torch.ops.npo_fast.scale_(one, factor)
    return gradients
