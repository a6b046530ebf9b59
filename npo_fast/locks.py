"""Locks on open files, which end with their process, however that ends."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CAN_LOCK = fcntl is not None
NO_LOCKS = "this system has no file locks: one process at a time may use a folder"
logger = logging.getLogger(__name__)


def lock(file: IO[Any] | int, wait: bool = True) -> None:
    """Takes the lock of an open file; where there are none, the log says so once.

    Raises:
        BlockingIOError: another process has it, and ``wait`` is false.
    """
    if CAN_LOCK:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    else:
        _say_unlocked()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Admits one process at a time for this folder."""
    if not CAN_LOCK:  # nor can a folder be opened there
        _say_unlocked()
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle)
        yield
    finally:
        os.close(handle)


@cache
def _say_unlocked() -> None:
    logger.warning(NO_LOCKS)
