"""Interleaved times of several calls: a slow phase of the machine then affects all of them."""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from npo_fast.bench.inputs import Inputs

Call = Callable[[], object]
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


@dataclass(frozen=True)
class Times:
    """Times of one call over the rounds."""

    times_ms: list[float]

    @property
    def median_ms(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.times_ms)

    def ratio_to(self, other: "Times") -> float:
        """Median over the rounds of the ratio within a round."""
        pairs = zip(self.times_ms, other.times_ms, strict=True)
        return statistics.median(ms / other_ms for ms, other_ms in pairs)


def time_ms(call: Call, device: torch.device) -> float:
    """Time of one call, with the GPU's work."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def interleaved(
    calls: Mapping[str, Call], rounds: int, device: torch.device, keep_memory: bool = True
) -> dict[str, Times]:
    """Times every call ``rounds`` times, round by round, after a round that is not counted.

    ``keep_memory`` is for CPUs: see ``freed_memory_kept``.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with freed_memory_kept() if keep_memory and device.type == "cpu" else nullcontext():
        for round_ in range(rounds + 1):
            for name, call in calls.items():
                elapsed_ms = time_ms(call, device)
                if round_ > 0:
                    times[name].append(elapsed_ms)
    return {name: Times(values) for name, values in times.items()}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, glibc keeps freed memory for the next call, as PyTorch's allocator for GPUs does.

    Without it every large tensor is mapped anew, and its page faults are timed instead of the
    arithmetic: where a virtual machine hands freed pages back to its host, they take longer than a
    matrix product. Other C libraries are left as they are.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_MAX, 65536)  # glibc's defaults
        library.mallopt(M_TRIM_THRESHOLD, 128 << 10)
        library.malloc_trim(0)


def bare_gemms(inputs: Inputs) -> tuple[Call, Call]:
    """The three GEMMs that every method needs, and the first alone, into existing buffers."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def first() -> None:
        torch.mm(hidden, weight.T, out=logits)

    def three() -> None:
        first()
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    return three, first


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
