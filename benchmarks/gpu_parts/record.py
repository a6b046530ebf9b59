"""What one process has measured so far, on disk after every measurement.

A process may be killed at any time, by its time limit or by the GPU. What it leaves behind:

    {"tables": {"table": {"row": {"ms": 1.2}}}, "errors": {"attempt": "why"},
     "running": {"name": "the attempt under way", "since": 12.3}}
"""

import gc
import json
import math
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
BROKEN = 86  # exit status of a process whose GPU context is of no more use
ERROR_LINES = 40
MESSAGE_CHARACTERS = 1000


class Record:
    """Tables of results and the errors of attempts; a process that starts again goes on with it."""

    def __init__(self, file: Path, device: torch.device, limit_s: float, skip: list[str]) -> None:
        self.file, self.device, self.skip = file, device, set(skip)
        self.deadline = time.monotonic() + limit_s
        self.data: dict[str, Any] = {"tables": {}, "errors": {}}
        if file.exists():
            self.data |= json.loads(file.read_text())

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def row(self, table: str, name: str, **values: Any) -> None:
        """Adds values to a row of a table."""
        row = self.data["tables"].setdefault(table, {}).setdefault(name, {})
        row |= {key: _rounded(value) for key, value in values.items()}
        self.save()

    def error(self, name: str, message: str) -> None:
        self.data["errors"][name] = message
        self.save()

    def attempt(self, name: str, call: Callable[[], T]) -> T | None:
        """What ``call`` returns; None where it raises, which is recorded and does no more harm.

        Not called at all where the time is up, or where it ended an earlier process. Where an
        error leaves the GPU's context unusable, the process ends: the next one skips ``name``.
        """
        if name in self.skip:
            return None
        if self.left_s < 0:
            self.error(name, "left out: no time left")
            return None
        outer = self.data.get("running")
        self.begin(name)
        try:
            found = call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            self.error(name, told(error))
            found = None
            self.end_if_broken()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.finish()
        if outer is not None:  # an attempt within an attempt, which goes on
            self.begin(outer["name"])
        return found

    def begin(self, name: str) -> None:
        self.data["running"] = {"name": name, "since": time.monotonic()}
        self.save()

    def finish(self) -> None:
        self.data.pop("running", None)
        self.save()

    def end_if_broken(self) -> None:
        """Ends the process after a device assert or an illegal access: nothing works after it."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except Exception as error:
            print(f"the GPU's context is broken: {error}", flush=True)
            os._exit(BROKEN)

    def save(self) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.data))
        new.replace(self.file)


def told(error: BaseException) -> str:
    """Where it happened, and the beginning of its message: PyTorch's can be long."""
    frames = "".join(traceback.format_tb(error.__traceback__)).splitlines()[-ERROR_LINES:]
    message = f"{type(error).__name__}: {error}"
    return "\n".join([*frames, message[:MESSAGE_CHARACTERS]])


def _rounded(value: Any) -> Any:
    """Five digits; what JSON has no number for becomes a word."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value
