"""Progress on standard error of the first process: a bar on a terminal, a few lines in a log.

``TQDM_DISABLE=1`` turns it off.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from tqdm import tqdm

from npo_fast.distributed import is_main_process
from npo_fast.metrics.logs import HOLDOUT, SETS, UTILITY_SETS
from npo_fast.runs.callbacks import Callback, Training
from npo_fast.tables import printable
from npo_fast.trainer.settings import StepRecord

# by the name of their log
SET_NAMES = {file: name for name, file in {**UTILITY_SETS, **SETS, "holdout": HOLDOUT}.items()}
LINES_S = 10.0  # between two lines of a log, at least
LINES_SHARE = 0.05  # and this share of the time that has passed: a day makes some hundred lines


class ProgressBar(Callback):
    """A bar over the steps with the loss terms and the time left.

    Its rate is that of the steps alone: evaluations and checkpoints in between do not count, nor do
    steps of a run that went on.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: _Bar | _Lines | None = None
        self.steps, self.time_s = 0, 0.0  # that this process has taken

    def on_start(self, training: Training) -> None:
        self._open(training.folder.metadata["steps"], training.state.step)

    def on_step(self, record: StepRecord) -> None:
        if self.bar is None:
            self._open(record.steps, record.step - 1)
        assert self.bar is not None
        self.steps, self.time_s = self.steps + 1, self.time_s + record.time_ms / 1e3
        self.bar.rate = self.steps / self.time_s if self.time_s else None
        terms = {name: f"{value:.3g}" for name, value in record.terms.items()}
        self.bar.set_postfix(terms, refresh=False)
        self.bar.update()

    def on_trained(self) -> None:
        self.on_end()

    def on_end(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _open(self, steps: int, done: int) -> None:
        if done < steps:
            self.bar = _bar(steps, self.title, "step", done)


@contextmanager
def progress(title: str) -> Iterator[Any]:
    """A function ``(part, done, total)`` that draws one bar a part, which goes when it is done."""
    bars: dict[str, _Bar | _Lines] = {}
    with ExitStack() as current:

        def update(part: str, done: int, total: int) -> None:
            if part not in bars:
                current.close()
                file, _, what = part.partition(" ")
                name = " ".join(filter(None, (title, SET_NAMES.get(file, file), what)))
                bars[part] = _bar(total, name, "", leave=False)
                current.callback(bars[part].close)
            bars[part].update(done - bars[part].n)

        yield update


def silence() -> None:
    """Draws no more bars in this process: another one has the terminal."""
    _Bar.silent = True


def _bar(total: int, title: str, unit: str, done: int = 0, leave: bool = True) -> "_Bar | _Lines":
    silent = _Bar.silent or not is_main_process()
    if not sys.stderr.isatty():
        return _Lines(total, printable(title), unit, done, silent)
    options: dict[str, Any] = {"disable": True} if silent else {}  # False beats TQDM_DISABLE
    return _Bar(
        total=total, initial=done, desc=printable(title), unit=unit, dynamic_ncols=True,
        mininterval=0.2, leave=leave, **options,
    )  # fmt: skip


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar that standard error need not take: it may be a terminal that has gone."""

    silent = False
    rate: float | None = None  # units a second, where they are not those of the clock

    @property
    def format_dict(self) -> dict[str, Any]:
        """What is shown."""
        shown = dict(super().format_dict)
        return shown if self.rate is None else {**shown, "rate": self.rate}

    def display(self, *arguments: Any, **options: Any) -> Any:
        with suppress(OSError):
            return super().display(*arguments, **options)
        return None

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Lines:
    """The same as lines of a log, which may be a file on a full disk; none of what is quick."""

    def __init__(self, total: int, title: str, unit: str, done: int, silent: bool) -> None:
        self.total, self.title, self.unit, self.initial = total, title, unit, done
        self.n: float = done
        self.silent = silent or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
        self.rate: float | None = None
        self.postfix = ""
        self.started = self.printed = time.monotonic()

    def set_postfix(self, values: Mapping[str, str], refresh: bool = False) -> None:
        """Shows these values too."""
        self.postfix = ", ".join(f"{name}={value}" for name, value in values.items())

    def update(self, count: float = 1) -> None:
        """Counts, and writes a line where the last one is some time ago."""
        self.n += count
        now = time.monotonic()
        if now - self.printed > max(LINES_S, LINES_SHARE * (now - self.started)):
            self._print()

    def close(self) -> None:
        """Writes the last line, after others."""
        if self.printed > self.started:
            self._print()
        self.silent = True

    def _print(self) -> None:
        if self.silent:
            return
        self.printed = time.monotonic()
        line = tqdm.format_meter(
            self.n, self.total, self.printed - self.started, prefix=self.title, unit=self.unit,
            rate=self.rate, postfix=self.postfix, initial=self.initial, ncols=0,
        )  # fmt: skip
        with suppress(OSError):
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
