"""What each way through the head costs: flops, bytes moved, bytes held. The fastest that fits wins.

Per call, N rows, V tokens, D wide, b bytes a logit (2 in half precision), R rows a chunk:

    way       logits                            flops           bytes beside those of the products
    whole     all rows at once; for N <= D in   6NDV            3bNV row kernels
              the memory of the head's gradient
    chunks    R rows at a time; the gradient    6NDV            3bNV + (8 N/R - 4)VD + (4 + b)VD
              adds up in fp32
    slices    all rows times a slice of the     8NDV            3bNV, and 8ND a slice for the sum
              vocabulary, made twice                            of d_hidden
    frozen    R rows at a time, no gradient     4NDV            3bNV
              of the head

Held beyond inputs and outputs: ``whole`` a strip of logits for N <= D, else bNV; ``chunks`` 4VD,
with the logits in the memory of the finished gradient; ``slices`` a slice, and the sum of d_hidden.
"""

from dataclasses import dataclass
from typing import Literal

from npo_fast.kernels.layout import column_stride

CHUNK_BYTES = 96 << 20  # logits alive at a time, where none can lie in a gradient
FROZEN_BYTES = 256 << 20  # ... and none is there: a GPU then does 7 % better than with 96 MiB
STRIP_BYTES = 32 << 20  # by which the gradient runs ahead of the logits that it replaces
SLICE_BYTES = 32 << 20  # logits of a slice of the vocabulary
ROW_TILE = 128  # GEMMs of a GPU take whole tiles of rows ...
GOOD_ROWS = 256  # ... better two at a time
# reached, not promised: an H100 with bf16, and with fp32 outside its tensor cores
FLOPS_PER_S = {2: 740e12, 4: 50e12, 8: 50e12}  # by bytes a logit
BYTES_PER_S = 3.0e12

Name = Literal["whole", "chunks", "slices", "frozen"]


@dataclass(frozen=True)
class Way:
    """One way through the head, and what it costs."""

    name: Name
    chunk_rows: int  # as the operators take it; 0: slices
    flops: float
    moved_bytes: float
    held_bytes: int  # beyond inputs and outputs

    def time_ms(self, itemsize: int) -> float:
        return 1e3 * (self.flops / FLOPS_PER_S[itemsize] + self.moved_bytes / BYTES_PER_S)


@dataclass(frozen=True)
class Problem:
    """One call: its sizes, and what is known of its tensors."""

    rows: int  # N
    width: int  # D
    vocabulary: int  # V, or what a slice of it has
    itemsize: int  # bytes a logit
    opmath_itemsize: int = 4  # of sums
    trains_head: bool = True
    on_cpu: bool = False
    makes_logits: bool = False  # operators that make none cannot serve

    def ways(self) -> list[Way]:
        """All that exist, the fastest of equals first."""
        if not self.trains_head:
            return [self.frozen()]
        return [self.whole(), self.chunks(), *([] if self.makes_logits else [self.slices()])]

    def choose(self, memory_bytes: int | None = None) -> Way:
        """The fastest that holds no more than ``memory_bytes``; else the one that holds least.

        None: no more than ``usual_bytes``.
        """
        ways = self.ways()
        most = self.usual_bytes if memory_bytes is None else memory_bytes
        best = ways[0]
        for way in ways[1:]:  # no sorting by a key: torch.compile follows this
            fits, best_fits = way.held_bytes <= most, best.held_bytes <= most
            if fits and best_fits:
                better = way.time_ms(self.itemsize) < best.time_ms(self.itemsize)
            else:
                better = way.held_bytes < best.held_bytes
            best = way if better else best
        return best

    @property
    def usual_bytes(self) -> int:
        """An fp32 gradient of the head, or ``CHUNK_BYTES``; twice as much on a CPU in bf16.

        CPUs have no product of bf16 operands with an fp32 result: to add up chunks, each rounded,
        takes a third longer than to make all logits at once, and is less exact.
        """
        usual = max(CHUNK_BYTES, self.opmath_itemsize * self.vocabulary * self.width)
        return 2 * usual if self._rounds_products else usual

    @property
    def _rounds_products(self) -> bool:
        return self.on_cpu and self.itemsize < self.opmath_itemsize

    def whole(self) -> Way:
        stride = column_stride(self.rows, self.on_cpu)
        held = self.itemsize * stride * self.vocabulary
        if stride <= self.width:
            held = strip_rows(self.vocabulary, self.width, self.itemsize) * self.width
            held *= self.itemsize
        return Way("whole", max(self.rows, 1), 6 * self._ndv, self._row_bytes, held)

    def chunks(self) -> Way:
        rows = self.chunk_rows()
        head = self.vocabulary * self.width
        steps = -(-self.rows // rows)
        moved = (2 * steps - 1) * self.opmath_itemsize * head  # the first is written, not read
        if self.opmath_itemsize == self.itemsize:
            held = self.itemsize * rows * self.vocabulary
        else:
            moved += (self.opmath_itemsize + self.itemsize) * head
            held = self.opmath_itemsize * head
            if column_stride(rows, self.on_cpu) > self.width:  # no room in the finished gradient
                held += self.itemsize * rows * self.vocabulary
        return Way("chunks", rows, 6 * self._ndv, self._row_bytes + moved, held)

    def slices(self) -> Way:
        held = SLICE_BYTES + 4 * self.rows * self.width  # the sum of d_hidden
        slices = -(-self.rows * self.vocabulary * self.itemsize // SLICE_BYTES)
        moved = self._row_bytes + 8.0 * self.rows * self.width * slices
        return Way("slices", 0, 8 * self._ndv, moved, held)

    def frozen(self) -> Way:
        rows = self.rows_of_bytes(CHUNK_BYTES if self.on_cpu else FROZEN_BYTES)
        held = self.itemsize * min(rows, self.rows) * self.vocabulary
        return Way("frozen", rows, 4 * self._ndv, self._row_bytes, held)

    def chunk_rows(self) -> int:
        """Of a chunk where several add up: as many as the finished gradient has room for."""
        if self.on_cpu or self.opmath_itemsize == self.itemsize:
            return self.rows_of_bytes(
                self.usual_bytes // 2 if self._rounds_products else CHUNK_BYTES
            )
        unit = GOOD_ROWS if self.width >= GOOD_ROWS else 64
        return max(unit, self.width // unit * unit)

    def rows_of_bytes(self, chunk_bytes: int) -> int:
        """Rows whose logits fit; on a GPU whole tiles, two at least.

        Each chunk reads the weight anew, R flops a byte: below 256 rows a GPU waits for memory.
        """
        rows = chunk_bytes // max(1, self.vocabulary * self.itemsize)
        return max(1, rows) if self.on_cpu else max(2, rows // ROW_TILE) * ROW_TILE

    @property
    def _ndv(self) -> float:
        return float(self.rows) * self.width * self.vocabulary

    @property
    def _row_bytes(self) -> float:
        return 3.0 * self.itemsize * self.rows * self.vocabulary


def strip_rows(vocabulary: int, width: int, itemsize: int) -> int:
    """Rows of the head's gradient in ``STRIP_BYTES``, or in an eighth of it where that is less."""
    most = min(STRIP_BYTES, vocabulary * width * itemsize // 8)
    return max(1, most // max(1, width * itemsize))
