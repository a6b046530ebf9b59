"""Part 3: how the gradient of the head is best accumulated, and in which layout of the logits.

The third GEMM alone, ``G.T @ hidden`` with G (N, V) and hidden (N, D):

mm + add_      fp32 product, then added to the fp32 gradient: 16 bytes an element of it
addmm          fp32, accumulated in place by the GEMM: 8 bytes
bf16           straight into the gradient in bf16: 2 bytes, one chunk only
strips         the same, with the logits in the gradient's memory: what is in the way moves first
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gpu_parts.measure import Prepared, free_memory, interleaved, peak_mib, summary
from gpu_parts.record import Record

WIDTH, VOCABULARY, ROWS = 4096, 128256, (4096, 1024, 392)
TINY_WIDTH, TINY_VOCABULARY, TINY_ROWS = 64, 512, (64, 16)
STRIPS_MIB, TINY_STRIPS_MIB = (8, 32, 128), (0.001, 0.01)
TOLERANCE = 2e-2

Variant = Callable[[], object] | Prepared


def run(record: Record, device: torch.device, tiny: bool, job: str) -> None:
    width, vocabulary = (TINY_WIDTH, TINY_VOCABULARY) if tiny else (WIDTH, VOCABULARY)
    for rows in TINY_ROWS if tiny else ROWS:
        name = f"N={rows} D={width} V={vocabulary}"
        measure = partial(one_size, record, name, rows, width, vocabulary, device, tiny)
        record.attempt(name, measure)
        free_memory(device)


def one_size(
    record: Record,
    table: str,
    rows: int,
    width: int,
    vocabulary: int,
    device: torch.device,
    tiny: bool,
) -> None:
    options = {"device": device, "dtype": torch.bfloat16}
    gradient = torch.randn(rows, vocabulary, **options) / vocabulary  # G, of the logits
    hidden = torch.randn(rows, width, **options)
    expected = gradient.T @ hidden
    third = Third(gradient, hidden, tiny)
    timed: dict[str, Variant] = {}
    for name, variant, result in third.variants():
        error = record.attempt(f"{table}: {name}", partial(once, variant, result, expected))
        if error is None:
            continue
        timed[name] = variant
        call = variant.call if isinstance(variant, Prepared) else variant
        if isinstance(variant, Prepared):
            variant.prepare()
        record.row(table, name, error=error)
        record.row(table, name, **peak_mib(call, device))
    timed |= layouts(gradient, hidden)
    flops = 2 * rows * width * vocabulary
    for name, times in interleaved(timed, device, tiny).items():
        record.row(table, name, **summary(times), tflop_per_s=flops / times.median_ms / 1e9)


def once(variant: Variant, result: Tensor, expected: Tensor) -> float:
    """The relative error of a result after one call."""
    result.zero_()
    if isinstance(variant, Prepared):
        variant.prepare()
        variant.call()
    else:
        variant()
    difference = result.float() - expected.float()
    error = float(difference.norm() / expected.float().norm())
    if not error <= TOLERANCE:
        raise AssertionError(f"wrong: relative error {error:.1e}")
    return error


class Third:
    """The third GEMM in every way, with the buffers of all of them."""

    def __init__(self, gradient: Tensor, hidden: Tensor, tiny: bool) -> None:
        self.gradient, self.hidden = gradient, hidden
        self.rows, self.vocabulary = gradient.shape
        self.width = hidden.shape[1]
        self.strips_mib = TINY_STRIPS_MIB if tiny else STRIPS_MIB
        self.wide = hidden.new_zeros(self.vocabulary, self.width, dtype=torch.float32)
        self.half = hidden.new_zeros(self.vocabulary, self.width)
        logits = self.half.view(-1)[-self.vocabulary * self.rows :]  # at the end of its memory
        self.by_column = logits.view(self.vocabulary, self.rows).t()
        self.by_row = logits.view(self.rows, self.vocabulary)

    def variants(self) -> Iterator[tuple[str, Variant, Tensor]]:
        """Name, call, and where its result lies."""
        yield "fp32, mm + add_", self.mm_add, self.wide
        yield "fp32, addmm in place", self.addmm, self.wide
        yield "bf16", partial(self.direct, self.gradient), self.half
        for mib in self.strips_mib:
            step = max(1, int(mib * 2**20) // (2 * self.rows))
            strips = Prepared(
                lambda: self.by_column.copy_(self.gradient), partial(self.in_memory, step)
            )
            yield f"bf16 in the logits' memory by column, strips of {mib:g} MiB", strips, self.half
            copied, viewed = (partial(self.apart, step, copy) for copy in (True, False))
            name = f"bf16, strips of {mib:g} MiB of logits by row elsewhere"
            yield f"{name}, copied", copied, self.half
            yield f"{name}, not copied", viewed, self.half
        tail = Prepared(lambda: self.by_row.copy_(self.gradient), self.tail_aside)
        yield "bf16 in the logits' memory by row, what is in the way moved at once", tail, self.half

    def mm_add(self) -> None:
        self.wide.add_(torch.mm(self.gradient.t(), self.hidden, out_dtype=torch.float32))

    def addmm(self) -> None:
        torch.addmm(
            self.wide, self.gradient.t(), self.hidden, out_dtype=torch.float32, out=self.wide
        )

    def direct(self, gradient: Tensor) -> None:
        torch.mm(gradient.t(), self.hidden, out=self.half)

    def in_memory(self, step: int) -> None:
        """A strip of logits never begins before the strip of the gradient that replaces it."""
        pairs = zip(self.by_column.split(step, dim=1), self.half.split(step), strict=True)
        for columns, out in pairs:
            torch.mm(columns.t().clone(), self.hidden, out=out)

    def apart(self, step: int, copy: bool) -> None:
        pairs = zip(self.gradient.split(step, dim=1), self.half.split(step), strict=True)
        for columns, out in pairs:
            torch.mm((_packed(columns) if copy else columns).t(), self.hidden, out=out)

    def tail_aside(self) -> None:
        """The gradient's first rows end before the logits begin; the others' logits move first."""
        free = self.vocabulary * (self.width - self.rows) // self.width
        tail = _packed(self.by_row[:, free:])
        if free:
            torch.mm(self.by_row[:, :free].t(), self.hidden, out=self.half[:free])
        torch.mm(tail.t(), self.hidden, out=self.half[free:])


def _packed(columns: Tensor) -> Tensor:
    """A copy, also where ``contiguous`` makes none."""
    return columns.clone(memory_format=torch.contiguous_format)


def layouts(gradient: Tensor, hidden: Tensor) -> dict[str, Variant]:
    """All three GEMMs with the logits row by row and column by column."""
    weight = torch.randn(gradient.shape[1], hidden.shape[1], device=hidden.device).bfloat16()
    by_column = gradient.t().contiguous().t()
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    calls: dict[str, Variant] = {}
    for layout, logits in (("row", gradient), ("column", by_column)):
        out = torch.empty_like(logits)  # keeps the strides
        calls[f"GEMM 1, logits by {layout}"] = partial(torch.mm, hidden, weight.t(), out=out)
        calls[f"GEMM 2, logits by {layout}"] = partial(torch.mm, logits, weight, out=d_hidden)
        calls[f"GEMM 3, logits by {layout}"] = partial(torch.mm, logits.t(), hidden, out=d_weight)
    return calls
