"""Memory layout and dtype of logits by device: what kernels and operators agree on."""

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast.tracing import constant_result

ROW_MULTIPLE = 16
HUGE_BYTES = 8 << 20  # of the smallest tensor for which huge pages are worth a request
PAGE = 4096
MADV_HUGEPAGE = 14


def empty_logits(rows: int, columns: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns uninitialised (rows, columns) memory in the layout that the row kernels need.

    Columns lie one after another. On the CPU rows are then the lanes of the kernels, and BLAS gets
    the weight as the tall factor of all three products, which costs it less for a few hundred rows.
    On a GPU any number of programs share a row, and a slice of the vocabulary is contiguous memory
    that begins at a multiple of 64 elements, whatever the vocabulary.
    """
    stride = column_stride(rows, runs_on_cpu(weight))
    return in_huge_pages(weight.new_empty(columns, stride, dtype=dtype))[:, :rows].t()


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns uninitialised gradients of hidden, weight and bias; empty where not needed."""
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape if needs[2] else 0),
    )


def empty_per_row(values: Tensor) -> Tensor:  # (R, …) -> (R,)
    """Returns one uninitialised number a row, in the opmath dtype."""
    return values.new_empty(values.shape[:1], dtype=opmath_dtype(values.dtype))


def product_dtype(weight: Tensor) -> torch.dtype:
    """Returns the dtype in which operands are multiplied and logits kept.

    A CPU without AMX multiplies fp32 faster, and fp32 logits cost no accuracy; no CPU is known to
    be fast at fp16.
    """
    if not runs_on_cpu(weight) or (weight.dtype == torch.bfloat16 and cpu_multiplies_bf16()):
        return weight.dtype
    return opmath_dtype(weight.dtype)


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which numbers of ``dtype`` are computed with: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def power_of_two(number: Tensor) -> Tensor:  # ()
    """Returns the power of two at or below a positive number, which it divides without rounding.

    At least 1e-30, so that fp32 holds what is divided by it; inf or NaN for such a number.
    """
    _, exponent = torch.frexp(number.clamp(min=1e-30))
    power = torch.ldexp(torch.ones_like(number), exponent - 1)
    return torch.where(number.isfinite(), power, number)


@constant_result
def cpu_multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 faster than fp32; NPO_FAST_CPU_BF16=0 or 1 overrides it.

    One with AMX does. AVX-512 BF16 alone does not on an Intel Xeon, the only such CPU measured
    (``benchmarks/results/cpu_bf16_without_amx.json``).
    """
    override = os.environ.get("NPO_FAST_CPU_BF16", "")
    if override:
        return override != "0"
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def runs_on_cpu(tensor: Tensor) -> bool:
    """Whether layouts and policies are those of a CPU; tests replace this function."""
    return tensor.is_cpu


def padded_rows(rows: int, on_cpu: bool) -> int:
    """Returns the rows that a GEMM works on: on a GPU a multiple of 16.

    Rows are the contiguous dimension of logits, and at any other number cuBLAS falls back to
    kernels that move 2 bytes at a time, three times as slow.
    """
    return rows if on_cpu else -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def pad_rows(values: Tensor, rows: int) -> Tensor:  # (R, …) -> (rows, …)
    """Returns ``values`` with rows of zeros after them."""
    more = rows - len(values)
    return F.pad(values, (0, 0) * (values.dim() - 1) + (0, more)) if more > 0 else values


def column_stride(rows: int, on_cpu: bool) -> int:
    """Returns the elements from one column of logits to the next.

    On a CPU a power of two would map every column to the same few sets of the cache. A GPU loads
    16 bytes at a time, and its fast GEMMs need columns to begin at multiples of 16 bytes.
    """
    if on_cpu:
        return rows + 16 if rows % 128 == 0 else rows
    return -(-rows // 64) * 64


def spans(count: int, step: int) -> list[slice]:
    """Cuts ``range(count)`` into slices of ``step``; the last may be shorter."""
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def in_huge_pages(memory: Tensor) -> Tensor:
    """Asks Linux for huge pages for an uninitialised tensor on the CPU, and returns the tensor.

    The gradient of the head is new memory at every call, which Linux maps page by page as it is
    first written: 0.35 ms a MiB in pages of 4 KiB, a third of that in pages of 2 MiB.
    """
    real = type(memory) is Tensor and memory.is_cpu  # a fake tensor has no address
    if real and memory.nbytes >= HUGE_BYTES and (advise := _madvise()) is not None:
        first = -(-memory.data_ptr() // PAGE) * PAGE
        last = (memory.data_ptr() + memory.nbytes) // PAGE * PAGE
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_HUGEPAGE)
    return memory


@cache
def _madvise() -> "ctypes._NamedFuncPointer | None":
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
