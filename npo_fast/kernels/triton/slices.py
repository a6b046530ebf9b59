"""Logsumexp of rows of logits, a slice of the vocabulary a program; what the row kernels share.

    peak[s, n], total[s, n]:  logsumexp over slice s of z_n is  peak + log(total)
    z_n = logit_scale * softcap * tanh(a_n / softcap)

Logits lie column after column, as ``empty_logits`` makes them: a program takes BLOCK_R neighbouring
rows of one column after another, so that loads have 16 bytes whatever the size of the
vocabulary, and any number of programs can share a row. Every lane keeps a running (peak, total):
nothing crosses lanes before the slice ends. The label may stay apart:
``log_prob = -log(1 + exp(logsumexp of the others - z_label))`` does not cancel at a sure token.
"""

from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.transform import HeadTransform
from npo_fast.kernels.triton.config import RowConfig, processors
from npo_fast.kernels.triton.math import activate, transform_arguments

# finite, so that the difference of two of them is 0 and not NaN
LOWEST = tl.constexpr(-3.0e38)
# of a program that calls ``join``: its rows, and the slices that it joins at a time
JOIN = MappingProxyType({"BLOCK_R": 32, "BLOCK_S": 32})
ALIGNED = 16  # rows: what Triton takes for divisible, and more than 16 bytes


class Sums(NamedTuple):
    """Sums of each slice and row: ``logsumexp = peaks + log(totals)``."""

    peaks: Tensor  # (S, N) fp32
    totals: Tensor  # (S, N) fp32, of exp(z - peak)


def grid_of(logits: Tensor, config: RowConfig) -> tuple[tuple[int, int], int]:  # (N, C)
    """Returns the launch grid, blocks of rows times slices, and the columns of a slice.

    Slices are as many as fill the GPU, each a multiple of a block's columns.
    """
    rows, columns = logits.shape
    row_blocks = max(1, triton.cdiv(rows, config.block_rows))
    blocks = triton.cdiv(columns, config.block_columns)
    wanted = triton.cdiv(processors(logits.device) * config.programs, row_blocks)
    slice_columns = triton.cdiv(blocks, min(wanted, blocks)) * config.block_columns
    return (row_blocks, triton.cdiv(columns, slice_columns)), slice_columns


def reachable_rows(logits: Tensor) -> int:  # (N, C)
    """Returns the rows that a program may read in every column: N, rounded up where it can be.

    A mask that ends at any N would make every load a few bytes long. The padding between columns
    is read, and written back unchanged.
    """
    rows, columns = logits.shape
    aligned = triton.cdiv(rows, ALIGNED) * ALIGNED
    row_stride, column_stride = logits.stride()
    if row_stride != 1 or column_stride % ALIGNED or columns == 0:
        return rows
    end = logits.storage_offset() + (columns - 1) * column_stride + aligned
    return aligned if end * logits.itemsize <= logits.untyped_storage().nbytes() else rows


@triton.jit
def _column_z(
    at, column, last, label, readable, softcap, logit_scale,
    HAS_LABELS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """z of a few columns; -inf past the end, and at the label."""
    counts = (column < last)[:, None]
    raw = tl.load(at, mask=counts & readable, other=0.0).to(tl.float32)
    z, _ = activate(raw, softcap, logit_scale, SOFTCAP)
    if HAS_LABELS:
        counts = counts & (column[:, None] != label)
    return tl.where(counts, z, -float("inf"))


@triton.jit
def slice_sums_kernel(
    logits, labels, peaks, totals,
    rows, reachable, columns, row_stride, column_stride, slice_columns, softcap, logit_scale,
    HAS_LABELS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: adds a slice of the vocabulary to the sums of some rows."""
    # a quarter of a tile at a time: four columns share a change of the peak, and its registers
    QUARTER: tl.constexpr = BLOCK_C // 4  # noqa: N806
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    within = tl.arange(0, QUARTER)
    first = tl.program_id(1) * slice_columns
    last = tl.minimum(first + slice_columns, columns)
    at = logits + (first + within).to(tl.int64)[:, None] * column_stride
    at += row.to(tl.int64)[None, :] * row_stride
    step = QUARTER * column_stride
    readable = (row < reachable)[None, :]
    label = tl.full((1, BLOCK_R), -1, tl.int32)
    if HAS_LABELS:
        label = tl.load(labels + row, mask=row < rows, other=-1).to(tl.int32)[None, :]
    peak = tl.full((QUARTER, BLOCK_R), LOWEST, tl.float32)
    total = tl.zeros((QUARTER, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_C):
        column = start + within
        a = _column_z(at, column, last, label, readable, softcap, logit_scale, HAS_LABELS, SOFTCAP)
        b = _column_z(
            at + step, column + QUARTER, last, label, readable, softcap, logit_scale,
            HAS_LABELS, SOFTCAP,
        )  # fmt: skip
        c = _column_z(
            at + 2 * step, column + 2 * QUARTER, last, label, readable, softcap, logit_scale,
            HAS_LABELS, SOFTCAP,
        )  # fmt: skip
        d = _column_z(
            at + 3 * step, column + 3 * QUARTER, last, label, readable, softcap, logit_scale,
            HAS_LABELS, SOFTCAP,
        )  # fmt: skip
        top = tl.maximum(peak, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)))
        total *= tl.exp(peak - top)
        total += (tl.exp(a - top) + tl.exp(b - top)) + (tl.exp(c - top) + tl.exp(d - top))
        peak = top
        at += 4 * step
    top = tl.max(peak, axis=0)
    total = tl.sum(total * tl.exp(peak - top[None, :]), axis=0)
    out = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(peaks + out, top, mask=row < rows)
    tl.store(totals + out, total, mask=row < rows)


@triton.jit
def join(peaks, totals, row, rows, slices, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns ``(peak, total)`` of rows from those of their slices, in a fixed order."""
    inside = (row < rows)[None, :]
    peak = tl.full((BLOCK_S, BLOCK_R), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_S, BLOCK_R), tl.float32)
    for first in range(0, slices, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        at = s.to(tl.int64)[:, None] * rows + row[None, :]
        there = inside & (s < slices)[:, None]
        other = tl.load(peaks + at, mask=there, other=LOWEST)
        top = tl.maximum(peak, other)
        total = total * tl.exp(peak - top)
        total += tl.load(totals + at, mask=there, other=0.0) * tl.exp(other - top)
        peak = top
    top = tl.max(peak, axis=0)
    return top, tl.sum(total * tl.exp(peak - top[None, :]), axis=0)


def slice_sums(
    logits: Tensor,  # (N, C) raw logits of a slice of the vocabulary, or of all of it
    labels: Tensor | None,  # (N,) int64, counted from the first column: left out; may lie outside
    transform: HeadTransform,
    config: RowConfig,
) -> Sums:
    """Launches the kernel: logsumexp of each row over each slice."""
    rows, columns = logits.shape
    grid, slice_columns = grid_of(logits, config)
    peaks = logits.new_empty(grid[1], rows, dtype=torch.float32)
    totals = torch.empty_like(peaks)
    if not rows:
        return Sums(peaks, totals)
    slice_sums_kernel[grid](
        logits, None if labels is None else labels.contiguous(), peaks, totals,
        rows, reachable_rows(logits), columns, *logits.stride(), slice_columns,
        **transform_arguments(transform), HAS_LABELS=labels is not None,
        BLOCK_R=config.block_rows, BLOCK_C=config.block_columns, num_warps=config.num_warps,
    )  # fmt: skip
    return Sums(peaks, totals)
