"""Saving that does not give up: where a folder cannot be written, another one takes the content.

A run that has trained for hours must not end without its weights because a disk is full, read-only
or gone. ``Saving.insist`` tries the folder itself, then ``--fallback-output``, then both again
until ``--save-wait`` is over or a signal came, and then the system's own folders.
"""

import logging
import math
import os
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from npo_fast.errors import CannotSaveError
from npo_fast.model.save import cannot_write

logger = logging.getLogger(__name__)

PAUSE_S = 5.0  # between attempts
REMINDER_S = 60.0  # between messages
FACTORS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}


class Saving:
    """Where content goes that a folder does not take.

    Args:
        fallback: the folder that the user named for it.
        wait_minutes: how long to wait for room before a folder of the system takes the content.
        stopped: whether the user wants the process to end, so that nothing waits for room.
        gives_up: whether to end without having saved; else it goes on trying.
    """

    def __init__(
        self,
        fallback: Path | None = None,
        wait_minutes: float = 0.0,
        stopped: Callable[[], object] = lambda: False,
        gives_up: bool = True,
    ) -> None:
        self.fallback, self.wait_minutes, self.stopped = fallback, wait_minutes, stopped
        self.gives_up = gives_up
        self.left_by_itself: Path | None = None  # the folder of the system that was taken

    def insist(
        self,
        folder: Path,
        write: Callable[[Path], None],
        size: int = 0,
        elsewhere: bool = True,
    ) -> Path:
        """Calls ``write`` with ``folder``, or with others until one takes it; returns which.

        Args:
            write: writes ``size`` bytes below a folder, and leaves what is there where it fails.
            elsewhere: whether the content is of use in another folder.

        Raises:
            CannotSaveError: no folder takes it, and this gives up (or would be of no use
                elsewhere) after the time to wait.
        """
        named = [self.fallback] if elsewhere and self.fallback not in (None, folder) else []
        typed: list[Path] = []
        end = time.monotonic() + 60 * self.wait_minutes
        reminder = 0.0
        while True:
            try:
                return _first([*typed, folder, *named], write)
            except CannotSaveError as error:
                reason = error
            in_time = not self.stopped() and time.monotonic() < end
            if not in_time and elsewhere:
                with suppress(CannotSaveError):
                    taken = self.left_by_itself = _first(_folders_of_the_system(folder.name), write)
                    logger.warning(f"{reason}: {taken} takes it")
                    return taken
            if not in_time and (self.gives_up or not elsewhere):
                raise reason
            if time.monotonic() >= reminder:
                reminder = time.monotonic() + REMINDER_S
                logger.warning(
                    _not_yet(reason, folder, size, end if in_time and elsewhere else None)
                )
            typed = _pause(PAUSE_S, end, self.stopped) if in_time else _pause(PAUSE_S)


def _not_yet(reason: Exception, folder: Path, size: int, end: float | None) -> str:
    """What to tell a person while nothing is saved; until ``end`` no folder of the system is."""
    then = "Trying again until there is room"
    if end is not None:
        then = (
            f"Trying again for {(end - time.monotonic()) / 60:.0f} minutes (--save-wait); then, or "
            f"on Ctrl-C or SIGTERM, it goes to {tempfile.gettempdir()}"
        )
    typed = " Another folder can be typed here, with Enter." if _is_asked() else ""
    return f"NOT SAVED YET: {reason}. It takes {in_words(size)}; {room(folder)}. {then}.{typed}"


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def room(folder: Path) -> str:
    """How much is free where a folder is or would be, in words."""
    try:
        place = existing(folder)
        return f"{place} has {in_words(shutil.disk_usage(place).free)} free"
    except OSError as error:
        return f"{folder} cannot be reached ({error.strerror})"


def in_words(size: float) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    unit = next((unit for unit, factor in FACTORS.items() if size >= factor), "KiB")
    return f"{size / FACTORS[unit]:.1f} {unit}"


def _first(folders: Iterable[Path], write: Callable[[Path], None]) -> Path:
    """The first of the folders that takes the content."""
    reasons: list[CannotSaveError] = []
    for folder in folders:
        try:
            write(folder)
        except Exception as error:
            if not (isinstance(error, CannotSaveError) or cannot_write(error)):
                raise
            if not isinstance(error, CannotSaveError):
                error = CannotSaveError(f"cannot write into {folder}: {error}")
            reasons.append(error)
            continue
        for reason in reasons:
            logger.warning(f"{reason}: {folder} takes it")
        return folder
    raise reasons[-1]


def _folders_of_the_system(name: str) -> Iterator[Path]:
    """New folders where a process may write without asking."""
    for parent in dict.fromkeys((tempfile.gettempdir(), "/var/tmp", str(Path.home()))):
        try:
            made = Path(tempfile.mkdtemp(prefix="npo-fast-", dir=parent))
        except OSError:
            continue
        yield made / name
        shutil.rmtree(made, ignore_errors=True)  # it did not take the content


def _is_asked() -> bool:
    """Whether a person at the terminal can answer: the process is not in the background."""
    try:
        return sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (AttributeError, OSError, ValueError):  # Windows; a stream that is closed
        return False


def _pause(
    seconds: float, end: float = math.inf, stopped: Callable[[], object] = lambda: False
) -> list[Path]:
    """Waits, not beyond ``end`` nor once ``stopped``; the folder that a person typed meanwhile."""
    end = min(end, time.monotonic() + seconds)
    while not stopped() and (left := end - time.monotonic()) > 0:
        if not _is_asked():
            time.sleep(min(0.2, left))
        elif select.select([sys.stdin], [], [], min(0.2, left))[0]:
            typed = sys.stdin.readline().strip()
            return [Path(typed).expanduser()] if typed else []
    return []
