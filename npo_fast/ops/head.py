"""The LM head, a chunk of rows at a time: the three GEMMs and the row kernels around them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import npo_fast.kernels  # noqa: F401  (declares the operators)
from npo_fast.kernels.reference import column_stride, empty_gradients, logits_room
from npo_fast.ops.skipping import Skipped, compact_, rows_that_matter

CHUNK_BYTES = 96 << 20  # logits alive at a time
# Rows of a chunk, by bytes a logit, below which a GPU does better without logits. A chunk reads
# and writes the fp32 gradient of the head, R / 4 flops a byte, where an H100 does 300 in half
# precision and 20 in fp32; so at these counts GEMM 3 alone takes longer than the tile kernels'
# whole pass with its fourth GEMM.
LEAST_ROWS = {2: 128, 4: 16}
UPCAST_BYTES = 16 << 20  # fp32 copy of a slice of a half-precision weight, on the CPU
MOVED_BYTES = 8 << 20  # logits that make way for the weight's gradient at a time


Needs = tuple[bool, bool, bool]  # whether hidden, weight and bias want a gradient
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight and bias


@dataclass(frozen=True)
class Head:
    """``z = logit_scale * softcap(weight @ h + bias)`` and what has to be known to evaluate it."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def logits_dtype(self) -> torch.dtype:
        """CPUs multiply fp32 faster than bf16 or fp16, and a wide chunk costs no accuracy."""
        dtype = self.weight.dtype
        return torch.promote_types(dtype, torch.float32) if self.weight.is_cpu else dtype

    @property
    def wide_dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

    def chunk_rows(self, chunk_bytes: int | None = None) -> int:
        """Rows whose logits fit ``chunk_bytes`` (None: ``CHUNK_BYTES``), at least one."""
        row_bytes = self.weight.shape[0] * self.logits_dtype.itemsize
        return max(1, (chunk_bytes or CHUNK_BYTES) // max(1, row_bytes))

    @property
    def least_rows(self) -> int:
        """Below so many rows a chunk the operators without logits are better."""
        return 0 if self.weight.is_cpu else LEAST_ROWS.get(self.logits_dtype.itemsize, 0)

    def buffer(self, rows: int) -> Tensor:  # (rows, V)
        """Room for the logits of one chunk after another.

        A buffer a chunk would keep two alive at a time, and the CPU would map in each page anew.
        """
        return logits_room(rows, len(self.weight), self.weight, self.logits_dtype)

    def room_in_gradient(self, rows: int) -> bool:
        """Whether the memory of the weight's gradient can hold the logits of so many rows."""
        return self.weight.is_cpu and column_stride(rows) <= self.weight.shape[1]

    def logits(
        self, hidden: Tensor, buffer: Tensor
    ) -> Tensor:  # (R, D) -> (R, V) raw, before softcap and scale
        hidden = hidden.to(self.logits_dtype)
        logits = buffer[: len(hidden)]
        for columns, weight in self._weight_tiles():
            if self.bias is None:
                torch.mm(hidden, weight.t(), out=logits[:, columns])
            else:
                bias = self.bias[columns].to(hidden.dtype)
                torch.addmm(bias, hidden, weight.t(), out=logits[:, columns])
        return logits

    def activate(self, logits: Tensor) -> Tensor:  # (R, V) raw -> z, in the wide dtype
        z = logits.to(self.wide_dtype)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z * self.logit_scale

    def log_probs(self, hidden: Tensor, labels: Tensor) -> Tensor:  # (N, D), (N,) -> (N,)
        log_probs, _ = torch.ops.npo_fast.linear_log_probs(
            hidden, self.weight, labels, self.bias, self.softcap, self.logit_scale
        )
        return log_probs

    def log_probs_and_gradient(
        self, hidden: Tensor, labels: Tensor, buffer: Tensor
    ) -> tuple[Tensor, Tensor]:  # (R,) log-probs and (R, V) their gradient in the raw logits
        logits = self.logits(hidden, buffer)
        return self.differentiate_(logits, hidden, labels), logits

    def differentiate_(
        self, logits: Tensor, hidden: Tensor, labels: Tensor
    ) -> Tensor:  # (R, V) logits of (R, D) -> (R,) log-probs; logits <- their gradient
        target = self._target_logits(hidden, labels)
        log_probs, _ = torch.ops.npo_fast.row_log_probs_(
            logits, labels, target, self.softcap, self.logit_scale
        )
        return log_probs

    def hidden_gradient(self, logits_gradient: Tensor) -> Tensor:  # (R, V) -> (R, D)
        tiles = self._weight_tiles()
        columns, weight = next(tiles)
        out = torch.mm(logits_gradient[:, columns], weight)
        for columns, weight in tiles:
            out.addmm_(logits_gradient[:, columns], weight)
        return out

    def _target_logits(self, hidden: Tensor, labels: Tensor) -> Tensor | None:
        """Raw target logits from an fp32 dot, where the chunk itself is rounded to half."""
        if self.logits_dtype == self.wide_dtype:
            return None
        target = (hidden.to(self.wide_dtype) * self.weight[labels].to(self.wide_dtype)).sum(-1)
        return target if self.bias is None else target + self.bias[labels].to(self.wide_dtype)

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


class HeadGradients:
    """Gradients of hidden, weight and bias, summed over chunks in a fixed order."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        needs: Needs,
        skip_below: float = 0.0,
        skipped: Skipped | None = None,
    ) -> None:
        self.head, self.rows = head, len(hidden)
        self.skip_below, self.skipped = skip_below, skipped
        weight, bias = head.weight, head.bias
        self.hidden = hidden.new_empty(hidden.shape) if needs[0] else None
        self.weight = weight.new_empty(weight.shape, dtype=head.wide_dtype) if needs[1] else None
        self.holds_logits = False
        self.beta = 0  # the first chunk overwrites: a pass of zeros over the head is not cheap
        self.bias = None
        if bias is not None and needs[2]:
            self.bias = bias.new_zeros(bias.shape, dtype=head.wide_dtype)

    def buffer(self, rows: int) -> Tensor:  # (rows, V)
        """Room for the logits of one chunk after another.

        The gradient of the weight is written last. A chunk of all rows, where they are fewer than
        the hidden state is wide, lies at the end of its memory and takes none of its own.
        """
        single, head = rows == self.rows, self.head
        self.holds_logits = self.weight is not None and single and head.room_in_gradient(rows)
        if self.weight is None or not self.holds_logits:
            return head.buffer(rows)
        vocabulary, stride = len(self.weight), column_stride(rows)
        return self.weight.view(-1)[-vocabulary * stride :].view(vocabulary, stride)[:, :rows].t()

    def add(
        self,
        rows: slice,
        hidden: Tensor,  # (R, D) the rows of this chunk
        log_probs: Tensor | None,  # (R,), for skipping
        logits_gradient: Tensor,  # (R, V) d log_prob / d logits
        g: Tensor,  # (R,) d loss / d log_prob
    ) -> None:
        """``d_hidden = g * (G W)`` and ``d_weight += G^T (g * hidden)``: g never meets width V."""
        kept = None
        if self.skip_below > 0 and log_probs is not None:
            scale = self.head.logit_scale
            kept = rows_that_matter(hidden, log_probs, g, scale, self.skip_below, self.skipped)
        if kept is not None:
            logits_gradient = compact_(logits_gradient, kept)
            hidden, g = hidden[kept], g[kept]
        g = g.unsqueeze(1)
        if self.hidden is not None:
            d_hidden = self.head.hidden_gradient(logits_gradient) * g
            if kept is None:
                self.hidden[rows] = d_hidden
            else:
                self.hidden[rows] = 0
                self.hidden[rows].index_copy_(0, kept, d_hidden.to(self.hidden.dtype))
        if self.bias is not None:
            self.bias += torch.mv(logits_gradient.t().to(g.dtype), g.squeeze(1))
        if self.weight is not None:
            scaled = (hidden * g).to(logits_gradient.dtype)
            if self.holds_logits:
                self._replace_logits(logits_gradient, scaled, self.weight)
            elif logits_gradient.dtype == self.weight.dtype:
                self.weight.addmm_(logits_gradient.t(), scaled, beta=self.beta)
            else:
                product = torch.mm(logits_gradient.t(), scaled, out_dtype=self.weight.dtype)
                self.weight = self.weight.add_(product) if self.beta else product
        self.beta = 1

    def _replace_logits(self, logits_gradient: Tensor, scaled: Tensor, weight: Tensor) -> None:
        """GEMM 3 into the memory in which the logits lie, a slice of the vocabulary at a time.

        A slice of logits never begins before the slice of the gradient that takes its place, so
        only the slice at hand has to move.
        """
        step = max(1, MOVED_BYTES // (max(1, len(scaled)) * scaled.itemsize))
        pairs = zip(logits_gradient.split(step, dim=1), weight.split(step), strict=True)
        for columns, out in pairs:
            torch.mm(columns.t().clone(), scaled, out=out)

    def finish(self) -> Gradients:
        """The gradients in the dtypes of their parameters."""
        weight, bias = self.weight, self.bias
        if weight is not None and self.beta == 0:  # no rows at all
            weight.zero_()
        return (
            self.hidden,
            None if weight is None else weight.to(self.head.weight.dtype),
            None if bias is None or self.head.bias is None else bias.to(self.head.bias.dtype),
        )


def or_empty(
    gradients: Gradients, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What an operator returns, which knows no None."""
    nothing = empty_gradients(hidden, weight, bias, (False, False, False))
    d_hidden, d_weight, d_bias = (
        empty if one is None else one for one, empty in zip(gradients, nothing, strict=True)
    )
    return d_hidden, d_weight, d_bias


def scale_(gradients: Gradients, upstream: Tensor) -> Gradients:
    """In place: autograd then keeps these buffers instead of copies."""
    if upstream.device.type != "cpu" or upstream != 1:  # to read a GPU is to wait for it
        for one in gradients:
            if one is not None:
                one.mul_(upstream)
    return gradients
