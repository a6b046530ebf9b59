"""What a run notes while it trains: on the disk as it happens, and in memory.

What a full disk does not take waits until there is room, and what is lost is written again.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from npo_fast.errors import CannotSaveError
from npo_fast.model.manifest import checked_records, records_state, sealed
from npo_fast.model.save import save_file
from npo_fast.run_files import EVALUATIONS, RUN, STEPS
from npo_fast.runs.output import is_open_file, locked_records

logger = logging.getLogger(__name__)


class Journal:
    """A file of records, one a line, that one process appends to; it knows what the file holds."""

    def __init__(self, path: Path, content: bytes = b"") -> None:
        self.path = path
        self._content, self._written = bytearray(content), len(content)

    @classmethod
    def resume(cls, path: Path, state: Mapping[str, Any]) -> "Journal":
        """The file as it was at this ``state``; later records are cut off.

        Raises:
            DamagedError: what it held then has changed.
        """
        journal = cls(path, checked_records(path, state))
        if path.exists():
            os.truncate(path, journal._written)
        return journal

    def append(self, record: Mapping[str, Any], sync: bool = False) -> None:
        """Adds a record; where it cannot be written a warning says so, once, and it waits."""
        waits = self._written < len(self._content)
        self._content += json.dumps(record).encode() + b"\n"
        try:
            self.flush(sync)
        except CannotSaveError as error:
            if not waits:
                logger.warning(f"warning: {error}; lines wait for room")

    def flush(self, sync: bool = True) -> None:
        """Writes what waits and what was lost, with ``sync`` until it is on the disk.

        Raises:
            CannotSaveError: it cannot be written; the file ends with a whole line, as before.
        """
        if not self._content:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                start = self._written if size >= self._written else 0
                os.ftruncate(file.fileno(), start)
                _append(file.fileno(), bytes(self._content[start:]), sync)
        except OSError as error:
            raise CannotSaveError(f"cannot write {self.path}: {error}") from error
        self._written = len(self._content)

    def records(self) -> list[dict[str, Any]]:
        """All records so far, those that wait among them."""
        return [json.loads(line) for line in self._content.splitlines()]

    def state(self) -> dict[str, Any]:
        """What ``resume`` takes to come back to here."""
        return records_state(self._content)

    def is_whole(self) -> bool:
        """Whether the file has the size of what was written."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        return size == self._written

    def move(self, path: Path) -> None:
        """Takes another file from here on, into which ``flush`` writes what it does not hold."""
        whole = path.is_file() and path.stat().st_size == len(self._content)
        self.path, self._written = path, len(self._content) if whole else 0

    def copy(self, path: Path) -> None:
        """Writes all records into another file; raises ``OSError``."""
        if self._content:
            save_file(path, lambda file: file.write_bytes(self._content))


class Records:
    """``run.json`` and the journals of a run, which holds the lock of its folder.

    Args:
        metadata: of ``run.json``, as whoever has this dictionary changes it.
        lock: steps.jsonl, open and locked; None where this process writes nothing.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any], lock: TextIO | None) -> None:
        self.folder, self.metadata, self.lock = folder, metadata, lock
        self.journals = {name: Journal(folder / name) for name in (STEPS, EVALUATIONS)}

    @property
    def steps(self) -> Journal:
        """The step records."""
        return self.journals[STEPS]

    @property
    def evaluations(self) -> Journal:
        """The evaluations while training."""
        return self.journals[EVALUATIONS]

    def resume(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes back to the ``states`` of the journals; ``DamagedError`` as theirs."""
        self.journals = {name: Journal.resume(self.folder / name, s) for name, s in states.items()}

    def states(self) -> dict[str, Any]:
        """What ``resume`` takes."""
        return {name: journal.state() for name, journal in self.journals.items()}

    @property
    def is_locked(self) -> bool:
        """Whether the file that is locked is still the one in the folder."""
        return self.lock is not None and is_open_file(self.lock, self.folder / STEPS)

    def lost(self) -> list[str]:
        """The files that are not as this process left them: deleted, cut, replaced."""
        names = [name for name, journal in self.journals.items() if not journal.is_whole()]
        names += [] if self.is_locked or STEPS in names else [STEPS]
        return names + ([] if (self.folder / RUN).is_file() else [RUN])

    def save_metadata(self) -> None:
        """Writes ``run.json``; raises ``CannotSaveError``."""
        try:
            _write_metadata(self.folder / RUN, self.metadata)
        except OSError as error:
            raise CannotSaveError(f"cannot write {self.folder / RUN}: {error}") from error

    def save(self) -> None:
        """Writes all that waits; raises ``CannotSaveError``."""
        for journal in self.journals.values():
            journal.flush()
        self.save_metadata()

    def try_to(self, save: Callable[[], None]) -> None:
        """Calls ``save``; where that fails a warning says so."""
        try:
            save()
        except CannotSaveError as error:
            logger.warning(f"warning: {error}")

    def restore(self, folder: Path) -> None:
        """Writes all into ``folder``, which is that of the run from here on, and locks it.

        Raises:
            CannotSaveError: it cannot be written; what is missing waits.
            UserError: another process has it.
        """
        if folder != self.folder:
            for name, journal in self.journals.items():
                journal.move(folder / name)
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.is_locked:
                self.close()
                self.lock = locked_records(folder)
        except OSError as error:
            raise CannotSaveError(f"cannot write {folder}: {error}") from error
        self.save()

    def reserve(self, folder: Path) -> None:
        """Writes all into another folder, without which the run could not go on there.

        Raises:
            CannotSaveError: it does not take them.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_metadata(folder / RUN, {**self.metadata, "moved_from": str(self.folder)})
            for name, journal in self.journals.items():
                journal.copy(folder / name)
        except OSError as error:
            raise CannotSaveError(f"cannot write {folder}: {error}") from error

    def move(self, folder: Path) -> None:
        """Writes all into another folder, and into the one that is left where the run is now."""
        left, self.metadata["moved_from"] = self.folder, str(self.folder)
        self.try_to(lambda: self.restore(folder))
        _mark_as_moved(left / RUN, {"status": "moved", "moved_to": str(folder)}, self.metadata)

    def close(self) -> None:
        """Gives up the lock; what waits is lost, so ``save`` it before."""
        if self.lock is not None:
            self.lock.close()


def _write_metadata(file: Path, metadata: Mapping[str, Any]) -> None:
    text = json.dumps(sealed(metadata), indent=2)
    save_file(file, lambda new: new.write_text(text))


def _mark_as_moved(file: Path, mark: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Says in the ``run.json`` that is left where the run is now, as far as that can be written."""
    try:
        _write_metadata(file, {**metadata, **mark})
    except OSError:
        with suppress(OSError), file.open("r+") as old:  # a few bytes in place, on a full disk
            old.write(json.dumps(sealed(mark)))
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
