"""Huge pages for large tensors on the CPU, where Linux grants them on request.

The gradient of the head is new memory at every call. Linux maps it page by page as it is first
written: 0.35 ms a MiB in pages of 4 KiB, a third of that in pages of 2 MiB.
"""

import ctypes
import sys
from functools import cache

from torch import Tensor

LEAST_BYTES = 8 << 20
PAGE = 4096
MADV_HUGEPAGE = 14


def in_huge_pages(memory: Tensor) -> Tensor:
    """Asks for huge pages for an uninitialised tensor and returns it; Linux may ignore this."""
    real = type(memory) is Tensor and memory.is_cpu  # a fake tensor has no address
    if real and memory.nbytes >= LEAST_BYTES and (advise := _madvise()) is not None:
        first = -(-memory.data_ptr() // PAGE) * PAGE
        last = (memory.data_ptr() + memory.nbytes) // PAGE * PAGE
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_HUGEPAGE)
    return memory


@cache
def _madvise() -> "ctypes._NamedFuncPointer | None":
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
