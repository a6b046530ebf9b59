"""The cost of each way through the head: flops, bytes moved, bytes of memory. The fastest that fits
is chosen.

Per call, N rows, V tokens, width D, b bytes a logit (2 in half precision), R rows a chunk:

    way       logits                            flops           bytes beside those of the products
    whole     one chunk of all rows; for N <= D 6NDV            3bNV row kernels
              in the memory of d_weight
    chunks    R rows at a time; the gradient    6NDV            3bNV + (8 N/R - 4)VD + (4 + b)VD
              adds up in fp32
    slices    all rows times a slice of the     8NDV            3bNV, and 8ND a slice for the sum
              vocabulary, made twice                            of d_hidden
    frozen    R rows at a time, no d_weight     4NDV            3bNV

Memory beyond inputs and outputs: ``whole`` a strip of d_weight for N <= D, else bNV; ``chunks``
4VD, with the logits in the memory of the finished gradient; ``slices`` a slice of logits, and the
sum of d_hidden. (``one_pass`` defines chunk, slice, tile, strip and slab.)
"""

from dataclasses import dataclass
from typing import Literal

from npo_fast.kernels.layout import column_stride

CHUNK_BYTES = 96 << 20  # logits of a chunk that cannot lie in a gradient
CPU_CHUNK_BYTES = 256 << 20  # ... on a CPU, no more than d_weight's: fewer passes over d_weight
FROZEN_BYTES = 256 << 20  # ... of a frozen head: a GPU is then 7 % faster than with 96 MiB
STRIP_BYTES = 32 << 20  # by which d_weight begins before the logits that it replaces
SLICE_BYTES = 32 << 20  # logits of a slice of the vocabulary
ROW_TILE = 128  # rows of the tiles that a GPU's GEMMs compute ...
GOOD_ROWS = 256  # ... which are faster two at a time
# measured, not peak rates: an H100 with bf16, and with fp32 outside its tensor cores
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
    held_bytes: int  # memory beyond inputs and outputs

    def time_ms(self, itemsize: int) -> float:
        """Returns the predicted time on an H100 for logits of ``itemsize`` bytes."""
        return 1e3 * (self.flops / FLOPS_PER_S[itemsize] + self.moved_bytes / BYTES_PER_S)


@dataclass(frozen=True)
class Problem:
    """The sizes of one call and the properties of its tensors."""

    rows: int  # N
    width: int  # D
    vocabulary: int  # V, or the rows of a rank's slice
    itemsize: int  # bytes a logit
    opmath_itemsize: int = 4  # of sums
    trains_head: bool = True
    on_cpu: bool = False
    makes_logits: bool = False  # the call needs logits, so slices cannot serve

    def ways(self, memory_bytes: int | None = None) -> list[Way]:
        """Returns all ways that can serve, the fastest of equals first."""
        if not self.trains_head:
            return [self.frozen()]
        slices = [] if self.makes_logits else [self.slices()]
        return [self.whole(), self.chunks(memory_bytes), *slices]

    def choose(self, memory_bytes: int | None = None) -> Way:
        """Returns the fastest way within ``memory_bytes``, or the one that needs the least.

        None stands for ``usual_bytes``.
        """
        ways = self.ways(memory_bytes)
        limit = self.usual_bytes if memory_bytes is None else memory_bytes
        best = ways[0]
        for way in ways[1:]:  # no sorting by a key: torch.compile follows this
            fits, best_fits = way.held_bytes <= limit, best.held_bytes <= limit
            if fits and best_fits:
                better = way.time_ms(self.itemsize) < best.time_ms(self.itemsize)
            else:
                better = way.held_bytes < best.held_bytes
            best = way if better else best
        return best

    @property
    def usual_bytes(self) -> int:
        """The default memory: an fp32 d_weight or ``CHUNK_BYTES``; twice that on a CPU in bf16.

        CPUs have no product of bf16 operands with an fp32 result: adding up chunks, each rounded,
        takes a third longer than one chunk of all rows, and is less exact.
        """
        usual = max(CHUNK_BYTES, self.opmath_itemsize * self.vocabulary * self.width)
        return 2 * usual if self._rounds_products else usual

    @property
    def _rounds_products(self) -> bool:
        return self.on_cpu and self.itemsize < self.opmath_itemsize

    def whole(self) -> Way:
        """Returns the way with one chunk of all rows."""
        stride = column_stride(self.rows, self.on_cpu)
        held = self.itemsize * stride * self.vocabulary
        if stride <= self.width:
            held = strip_rows(self.vocabulary, self.width, self.itemsize) * self.width
            held *= self.itemsize
        return self._way("whole", max(self.rows, 1), 6, 0, held)

    def chunks(self, memory_bytes: int | None = None) -> Way:
        """Returns the way with several chunks whose gradients of the head add up."""
        rows = self.chunk_rows(memory_bytes)
        head = self.vocabulary * self.width
        steps = -(-self.rows // rows)
        moved = (2 * steps - 1) * self.opmath_itemsize * head  # the first is written, not read
        if self.opmath_itemsize == self.itemsize:
            held = self.itemsize * rows * self.vocabulary
        else:
            moved += (self.opmath_itemsize + self.itemsize) * head
            held = self.opmath_itemsize * head
            if column_stride(rows, self.on_cpu) > self.width:  # more than the finished gradient
                held += self.itemsize * rows * self.vocabulary
        return self._way("chunks", rows, 6, moved, held)

    def slices(self) -> Way:
        """Returns the way over slices of the vocabulary, whose logits are made twice."""
        held = SLICE_BYTES + 4 * self.rows * self.width  # the sum of d_hidden
        slices = -(-self.rows * self.vocabulary * self.itemsize // SLICE_BYTES)
        return self._way("slices", 0, 8, 8 * self.rows * self.width * slices, held)

    def frozen(self) -> Way:
        """Returns the way of a head that needs no gradient."""
        rows = self.rows_of_bytes(CHUNK_BYTES if self.on_cpu else FROZEN_BYTES)
        held = self.itemsize * min(rows, self.rows) * self.vocabulary
        return self._way("frozen", rows, 4, 0, held)

    def _way(self, name: Name, chunk_rows: int, gemms: int, moved: int, held: int) -> Way:
        """Counts ``gemms`` times NDV flops, and the row kernels beside ``moved`` bytes."""
        flops = gemms * float(self.rows) * self.width * self.vocabulary
        row_bytes = 3.0 * self.itemsize * self.rows * self.vocabulary
        return Way(name, chunk_rows, flops, row_bytes + moved, held)

    def chunk_rows(self, memory_bytes: int | None = None) -> int:
        """Returns the rows of a chunk where several add up: those that fit d_weight's memory.

        On a CPU chunks are of about one size, with an eighth of room for whole sequences.
        """
        if self._rounds_products:
            return self.rows_of_bytes(self.usual_bytes // 2)
        if self.on_cpu:
            allowed = self.usual_bytes if memory_bytes is None else memory_bytes
            most = self.rows_of_bytes(
                min(self.usual_bytes, CPU_CHUNK_BYTES, max(allowed, CHUNK_BYTES))
            )
            equal = -(-self.rows // max(1, -(-self.rows // most)))
            return max(1, min(most, equal + equal // 8))
        if self.opmath_itemsize == self.itemsize:
            return self.rows_of_bytes(CHUNK_BYTES)
        unit = GOOD_ROWS if self.width >= GOOD_ROWS else 64
        return max(unit, self.width // unit * unit)

    def rows_of_bytes(self, chunk_bytes: int) -> int:
        """Returns the rows whose logits fit; on a GPU a multiple of ``ROW_TILE``, at least two.

        Each chunk reads the weight anew, R flops a byte: below 256 rows a GPU waits for memory.
        """
        rows = chunk_bytes // max(1, self.vocabulary * self.itemsize)
        return max(1, rows) if self.on_cpu else max(2, rows // ROW_TILE) * ROW_TILE


def strip_rows(vocabulary: int, width: int, itemsize: int) -> int:
    """Returns the rows of a strip: ``STRIP_BYTES``, or an eighth of d_weight where that is less."""
    strip_bytes = min(STRIP_BYTES, vocabulary * width * itemsize // 8)
    return max(1, strip_bytes // max(1, width * itemsize))
