"""Where logits lie and in which dtype, by the device: what kernels and operators agree on."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from npo_fast.kernels.pages import in_huge_pages

ROW_MULTIPLE = 16


def empty_logits(rows: int, columns: int, beside: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, columns), uninitialised, in the layout that the row kernels like.

    A column follows a column. On the CPU rows are then the lanes of the kernels, and BLAS meets the
    weight as the tall factor of all three products, which costs it less for a few hundred rows. On
    a GPU any number of programs share a row, and a slice of the vocabulary is one piece of memory
    that begins at a multiple of 64 elements, whatever the vocabulary.
    """
    stride = column_stride(rows, runs_on_cpu(beside))
    return in_huge_pages(beside.new_empty(columns, stride, dtype=dtype))[:, :rows].t()


def product_dtype(weight: Tensor) -> torch.dtype:
    """In which dtype operands are multiplied and logits kept.

    A CPU without instructions for bf16 multiplies fp32 faster, and wide logits cost no accuracy;
    none is known to be fast at fp16.
    """
    if not runs_on_cpu(weight) or (weight.dtype == torch.bfloat16 and cpu_multiplies_bf16()):
        return weight.dtype
    return torch.promote_types(weight.dtype, torch.float32)


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which numbers of ``dtype`` are computed with: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


@torch.compiler.assume_constant_result  # torch.compile cannot look for itself
def cpu_multiplies_bf16() -> bool:
    """AMX, or AVX-512 BF16; NPO_FAST_CPU_BF16=0 or 1 decides otherwise."""
    wish = os.environ.get("NPO_FAST_CPU_BF16", "")
    if wish:
        return wish != "0"
    has = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in has)


def runs_on_cpu(tensor: Tensor) -> bool:
    """Whether layouts and policies are those of a CPU. Tests ask for a GPU's on a CPU."""
    return tensor.is_cpu


def padded_rows(rows: int, on_cpu: bool) -> int:
    """Rows that a GEMM works on: of a GPU a multiple of 16.

    Rows of logits are the dimension that is contiguous in memory, and at any other number cuBLAS
    falls to kernels that move 2 bytes at a time, three times as slow.
    """
    return rows if on_cpu else -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def column_stride(rows: int, on_cpu: bool) -> int:
    """Elements from a column to the next.

    On a CPU a power of two would put every column into the same few sets of the cache. A GPU loads
    16 bytes at a time, and its fast GEMMs want rows of memory to begin at multiples of those.
    """
    if on_cpu:
        return rows + 16 if rows % 128 == 0 else rows
    return -(-rows // 64) * 64


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of hidden, weight and bias; empty where one is not wanted."""
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape if needs[2] else 0),
    )
