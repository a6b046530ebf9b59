"""The LM head, a chunk of rows at a time: GEMM 1, and the row kernels on its logits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import npo_fast.kernels  # noqa: F401  (declares the operators)
from npo_fast.kernels import layout
from npo_fast.kernels.layout import empty_logits, opmath_dtype, pad_rows, padded_rows, spans
from npo_fast.kernels.products import add_product_, linear_
from npo_fast.kernels.transform import HeadTransform
from npo_fast.ops import cost
from npo_fast.ops.cost import Problem

UPCAST_BYTES = 16 << 20  # of the fp32 copy of a slice of a half-precision weight, on the CPU


class Softmax(NamedTuple):
    """Log-probs of the labels and the softmax of each row of a chunk, its padding included.

    ``softmax(z) = exp(z - shift) * share``.
    """

    log_probs: Tensor  # (R,) of the labels
    lse: Tensor  # (R,)
    labels: Tensor  # (R,)
    shift: Tensor  # (R,)
    share: Tensor  # (R,)

    def select(self, rows: Tensor, padded: int) -> "Softmax":  # (K,) row numbers
        """Returns the chosen rows, padded with zeros to ``padded``."""
        return Softmax(*(pad_rows(values[rows], padded) for values in self))


@dataclass(frozen=True)
class Head:
    """A linear head, ``z = transform(weight @ h + bias)``: all of its settings in one value."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    transform: HeadTransform = HeadTransform()

    @property
    def tokens(self) -> int:
        """Tokens that the head predicts, V."""
        return len(self.weight)

    @property
    def logits_dtype(self) -> torch.dtype:
        """The dtype of logits: half precision where the processor multiplies in it."""
        return layout.product_dtype(self.weight)

    @property
    def opmath_dtype(self) -> torch.dtype:
        """The dtype of log-probs and sums: fp32, or fp64 for an fp64 weight."""
        return opmath_dtype(self.weight.dtype)

    def problem(self, rows: int, trains_head: bool) -> Problem:
        """Returns the sizes of a call with so many rows, as the cost model takes them."""
        vocabulary, width = self.weight.shape
        return Problem(
            rows, width, vocabulary,
            itemsize=self.logits_dtype.itemsize, opmath_itemsize=self.opmath_dtype.itemsize,
            trains_head=trains_head, on_cpu=layout.runs_on_cpu(self.weight),
        )  # fmt: skip

    def chunk_rows(self, chunk_bytes: int | None = None) -> int:
        """Returns how many rows of logits fit ``chunk_bytes`` (default ``cost.CHUNK_BYTES``)."""
        return self.problem(0, False).rows_of_bytes(chunk_bytes or cost.CHUNK_BYTES)

    def padded(self, rows: int) -> int:
        """Returns how many rows a GEMM works on for so many rows of hidden."""
        return padded_rows(rows, layout.runs_on_cpu(self.weight))

    def buffer(self, rows: int) -> Tensor:  # (padded rows, V)
        """Returns uninitialised memory for the logits of one chunk after another.

        A buffer a chunk would keep two alive at a time, and the CPU would map in each page anew.
        """
        return empty_logits(self.padded(rows), len(self.weight), self.weight, self.logits_dtype)

    def operand(self, hidden: Tensor) -> Tensor:  # (R, D) -> (padded R, D)
        """Returns ``hidden`` in the dtype of the logits, padded with zeros."""
        return pad_rows(hidden.to(self.logits_dtype), self.padded(len(hidden)))

    def logits(
        self, hidden: Tensor, buffer: Tensor
    ) -> Tensor:  # (R, D), (padded R or more, V) -> (padded R, V)
        """GEMM 1: writes the raw logits ``hidden @ weight.T + bias`` into ``buffer``."""
        hidden = self.operand(hidden)
        logits = buffer[: len(hidden)]
        for columns, weight in self._weight_slices():
            bias = None if self.bias is None else self.bias[columns]
            linear_(logits[:, columns], hidden, weight, bias)
        return logits

    def activate(self, logits: Tensor) -> Tensor:  # (R, V) raw -> z
        """Returns the transformed logits in the opmath dtype."""
        return self.transform.apply(logits.to(self.opmath_dtype))

    def log_probs(self, hidden: Tensor, labels: Tensor) -> Tensor:  # (N, D), (N,) -> (N,)
        """Returns the log-probs of the labels, and makes no logits of all rows at once."""
        log_probs, _ = torch.ops.npo_fast.linear_log_probs(
            hidden, self.weight, labels, self.bias, *self.transform
        )
        return log_probs

    def logits_and_softmax(
        self, hidden: Tensor, labels: Tensor, buffer: Tensor
    ) -> tuple[Tensor, Softmax]:  # (R, D), (R,), (padded R or more, V) -> (padded R, V)
        """GEMM 1 and the first row kernel: raw logits in ``buffer``, their softmax, log-probs."""
        logits = self.logits(hidden, buffer)
        return logits, self._softmax(logits, hidden, labels)

    def _softmax(
        self, logits: Tensor, hidden: Tensor, labels: Tensor
    ) -> Softmax:  # (padded R, V) raw logits of (R, D), (R,)
        target = None
        if self.logits_dtype != self.opmath_dtype:  # half precision: the label's from an fp32 dot
            target = torch.ops.npo_fast.label_logits(hidden, self.weight, labels, self.bias)
            target = pad_rows(target, len(logits))
        labels = pad_rows(labels, len(logits))
        log_probs, lse, shift, share = torch.ops.npo_fast.row_log_probs(
            logits, labels, target, *self.transform
        )
        return Softmax(log_probs, lse, labels, shift, share)

    def localize(self, labels: Tensor) -> tuple[Tensor, Tensor]:  # (R,) each
        """Returns the columns of labels, and which of them are among those of this head."""
        return labels, torch.ones_like(labels, dtype=torch.bool)

    def argmax(self, logits: Tensor) -> Tensor:  # (R, V) -> (R,)
        """Returns the token with the largest logit."""
        return logits.argmax(dim=-1)

    def log_softmax(self, logits: Tensor) -> Tensor:  # (R, V) raw -> (R, V) in the opmath dtype
        """Returns the log-probs of all tokens, or of those of a slice."""
        return self.activate(logits).log_softmax(dim=-1)

    def begin_lse(
        self, logits: Tensor, transform: HeadTransform
    ) -> Callable[[], Tensor | None]:  # (R, V) raw -> (R,)
        """Returns what waits for the logsumexp over the slices of all ranks; None without them."""
        return lambda: None

    def sum_over_ranks(self, values: Tensor) -> Tensor:  # (R,), overwritten
        """Returns the sum of what the slices of all ranks add up to."""
        return values

    def differentiate_(self, logits: Tensor, softmax: Softmax, g: Tensor) -> None:
        """Runs the second row kernel: logits <- the gradient in them, in place.

        ``g`` (R,) is the derivative of the loss in the log-probs. Padding becomes zero.
        """
        torch.ops.npo_fast.row_gradient_(
            logits, softmax.labels, softmax.log_probs, softmax.shift, softmax.share,
            pad_rows(g, len(logits)), *self.transform,
        )  # fmt: skip
        logits[len(g) :] = 0  # 0 times exp(bias) is no number where the bias is large

    def hidden_gradient(
        self, logits_gradient: Tensor, out: Tensor, alpha: float
    ) -> None:  # (R, V), (R, D)
        """GEMM 2: ``out = alpha * logits_gradient @ weight``."""
        for columns, weight in self._weight_slices():
            beta = int(columns.start > 0)
            add_product_(out, logits_gradient[:, columns], weight, beta, alpha)

    def _weight_slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields the weight in ``logits_dtype``: itself, or converted slices of its rows."""
        vocabulary, width = self.weight.shape
        if self.weight.dtype == self.logits_dtype:
            yield slice(0, vocabulary), self.weight
            return
        step = max(1, UPCAST_BYTES // (max(1, width) * self.logits_dtype.itemsize))
        for columns in spans(vocabulary, step):
            yield columns, self.weight[columns].to(self.logits_dtype)
