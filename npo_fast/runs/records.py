"""What a run notes while it trains; what a full disk does not take waits until there is room."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from npo_fast.errors import CannotSaveError
from npo_fast.model.save import save_file

logger = logging.getLogger(__name__)

RUN, STEPS, EVALUATIONS = "run.json", "steps.jsonl", "evaluations.jsonl"


class Journal:
    """Appends lines to a file; what cannot be written is kept, and written with the next.

    Args:
        file: the same file, where it stays open (and locked) meanwhile.
    """

    def __init__(self, path: Path, file: IO[str] | None = None) -> None:
        self.path, self.file = path, file
        self._waiting: list[str] = []

    def append(self, line: Mapping[str, Any], sync: bool = False) -> None:
        """Writes a line at the end; where that fails a warning says so, once, and it waits."""
        self._waiting.append(json.dumps(line) + "\n")
        try:
            self.flush(sync)
        except CannotSaveError as error:
            if len(self._waiting) == 1:
                logger.warning(f"warning: {error}; lines wait for room")

    def flush(self, sync: bool = True) -> None:
        """Writes what waits, with ``sync`` until it is on the disk.

        Raises:
            CannotSaveError: it cannot be written; the file ends with a whole line, as before.
        """
        if not self._waiting and self.file is None:
            return
        try:
            with nullcontext(self.file) if self.file else self.path.open("a") as file:
                _append(file.fileno(), "".join(self._waiting).encode(), sync)
        except OSError as error:
            raise CannotSaveError(f"cannot write {self.path}: {error}") from error
        self._waiting.clear()

    def content(self) -> bytes:
        """All lines, those that wait among them; where the file is gone those alone."""
        written = b""
        with suppress(OSError):
            written = self.path.read_bytes()
        return written + "".join(self._waiting).encode()

    def lines(self) -> list[dict[str, Any]]:
        """``content``, read."""
        return [json.loads(line) for line in self.content().splitlines()]

    def close(self) -> None:
        """Closes the file; what waits is lost, so ``flush`` it before."""
        if self.file is not None:
            self.file.close()


class Records:
    """``run.json`` and the journals of a run.

    Args:
        metadata: of ``run.json``, as whoever has this dictionary changes it.
        steps: steps.jsonl, open and locked.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any], steps: IO[str] | None) -> None:
        self.folder, self.metadata = folder, metadata
        self.steps = Journal(folder / STEPS, steps)
        self.evaluations = Journal(folder / EVALUATIONS)

    def save_metadata(self) -> None:
        """Writes ``run.json``; raises ``CannotSaveError``."""
        text = json.dumps(self.metadata, indent=2, default=str)
        try:
            save_file(self.folder / RUN, lambda file: file.write_text(text))
        except OSError as error:
            raise CannotSaveError(f"cannot write {self.folder / RUN}: {error}") from error

    def save(self) -> None:
        """Writes all that waits; raises ``CannotSaveError``."""
        self.steps.flush()
        self.evaluations.flush()
        self.save_metadata()

    def try_to(self, save: Callable[[], None]) -> None:
        """Calls ``save``; where that fails a warning says so."""
        try:
            save()
        except CannotSaveError as error:
            logger.warning(f"warning: {error}")

    def move(self, folder: Path, steps: IO[str] | None) -> None:
        """Writes all into another folder from now on, and into the one that is left where it is."""
        left, journals = self.folder, (self.steps, self.evaluations)
        self.folder, self.metadata["moved_from"] = folder, str(left)
        self.steps, self.evaluations = Journal(folder / STEPS, steps), Journal(folder / EVALUATIONS)
        for old, new in zip(journals, (self.steps, self.evaluations), strict=True):
            for line in old.lines():
                new.append(line)
            with suppress(OSError):
                old.close()
        self.try_to(self.save_metadata)
        _mark_as_moved(left / RUN, {"status": "moved", "moved_to": str(folder)}, self.metadata)


def _mark_as_moved(file: Path, mark: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Says in the ``run.json`` that is left where the run is now, as far as that can be written."""
    text = json.dumps({**metadata, **mark}, indent=2, default=str)
    try:
        save_file(file, lambda new: new.write_text(text))
    except OSError:
        with suppress(OSError), file.open("r+") as old:  # a few bytes in place, on a full disk
            old.write(json.dumps(mark))
            old.truncate()


def _append(handle: int, content: bytes, sync: bool) -> None:
    """All of the content or, with an ``OSError``, none of it."""
    end = os.fstat(handle).st_size
    try:
        while content:
            content = content[os.write(handle, content) :]
        if sync:
            os.fsync(handle)
    except OSError:
        with suppress(OSError):
            os.ftruncate(handle, end)
        raise
