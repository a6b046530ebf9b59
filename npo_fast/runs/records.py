"""Records of a run, one a line: on the disk as they happen, and in memory."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npo_fast.model.manifest import checked_records, records_state


class RecordFile:
    """A file of records that one process appends to; it knows what the file should hold."""

    def __init__(self, path: Path, content: bytes = b"") -> None:
        self.path, self._content = path, bytearray(content)

    @classmethod
    def resume(cls, path: Path, state: Mapping[str, Any]) -> "RecordFile":
        """The file as it was at this ``state``; later records are cut off.

        Raises:
            DamagedError: what it held then has changed.
        """
        file = cls(path, checked_records(path, state))
        if path.exists():
            os.truncate(path, len(file._content))
        return file

    def append(self, record: Mapping[str, Any], sync: bool = False) -> None:
        """Adds a record; with ``sync`` waits until it is on the disk."""
        line = json.dumps(record).encode() + b"\n"
        self._content += line  # first: where writing fails, ``restore`` writes it
        with self.path.open("ab") as file:
            file.write(line)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """All records so far."""
        return [json.loads(line) for line in self._content.splitlines()]

    def state(self) -> dict[str, Any]:
        """What ``resume`` takes to come back to here."""
        return records_state(self._content)

    def is_whole(self) -> bool:
        """Whether the file has the size of what was written."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        return size == len(self._content)

    def restore(self, path: Path) -> None:
        """Writes all records into ``path``, the file from here on."""
        self.path = path
        if self._content:
            path.write_bytes(self._content)
