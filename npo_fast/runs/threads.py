"""How many threads PyTorch takes for a run on the CPU.

It takes every core by default. A model of a few million parameters is then many times slower than
on one thread, as soon as another process wants a core: threads wait for one another at each of its
thousands of small operations.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

PARAMETERS_A_THREAD = 5_000_000  # with fewer, a second thread waits more than it computes
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

logger = logging.getLogger("npo_fast.threads")  # the demo silences those of npo_fast.runs


class Machine(NamedTuple):
    """What a run finds when it begins."""

    cores: int  # that PyTorch would take
    load: float  # processes that want a core, a mean over the last minute
    wish: int | None  # threads, where the user set them


_machine: ContextVar[Machine | None] = ContextVar("machine", default=None)


def thread_count(parameters: int, machine: Machine) -> int:
    """Returns the threads for a model: the user's wish, else as many as it feeds, of free cores.

    Where others are at work on all of them, half of the cores count as free.
    """
    if machine.wish is not None:
        return machine.wish
    free = max(machine.cores - round(machine.load), machine.cores // 2)
    return max(1, min(free, machine.cores, parameters // PARAMETERS_A_THREAD))


@contextmanager
def automatic_threads() -> Iterator[None]:
    """Inside, ``fit_threads`` chooses; afterwards PyTorch has the threads that it had.

    The command line is inside, a caller from Python is not: the number is one of his process.
    """
    before = torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    wish = before if any(os.environ.get(name) for name in VARIABLES) else None
    token = _machine.set(Machine(before, load, wish))
    try:
        yield
    finally:
        _machine.reset(token)
        torch.set_num_threads(before)


def fit_threads(parameters: int, device: torch.device, earlier: int | None = None) -> None:
    """Sets the threads for a model of so many parameters, within ``automatic_threads`` alone.

    Args:
        earlier: those of the run that goes on: with other ones its last bits would differ.
    """
    machine = _machine.get()
    if machine is None or device.type != "cpu":
        return
    threads = thread_count(parameters, machine)
    if earlier is not None and machine.wish is None:
        threads = min(earlier, machine.cores)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
        logger.info(
            f"threads: {threads} of {machine.cores}, for {parameters / 1e6:.1f}M parameters at a "
            f"load of {machine.load:.1f}; OMP_NUM_THREADS sets another number"
        )
