"""What a person sees: progress on standard error, results on standard output."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from npo_fast.distributed import is_main_process
from npo_fast.tables import number  # noqa: F401
from npo_fast.tables import plain as table  # noqa: F401
from npo_fast.trainer.settings import StepRecord


def say(text: str = "") -> None:
    """A line about what is going on, above a bar where there is one."""
    if is_main_process():
        tqdm.write(text, file=sys.stderr)


def show(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """The result of a verb: the text, or one JSON object."""
    if is_main_process():
        print(json.dumps(result, default=str) if as_json else text, flush=True)


def follow(records: Iterable[StepRecord], what: str) -> Iterator[StepRecord]:
    """Passes step records through, under a progress bar with the loss terms and the time left."""
    bar: tqdm[Any] | None = None
    try:
        for record in records:
            if bar is None:
                bar = _bar(record.steps, what, "step", record.step - 1)
            terms = {name: f"{value:.3g}" for name, value in record.terms.items()}
            bar.set_postfix({**terms, "grad": f"{record.grad_norm:.2g}"}, refresh=False)
            bar.update()
            yield record
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def progress(what: str) -> Iterator[Any]:
    """A callback ``(part, done, total)`` that draws one bar a part."""
    bars: dict[str, tqdm[Any]] = {}

    def update(part: str, done: int, total: int) -> None:
        if part not in bars:
            for bar in bars.values():
                bar.close()
            name = part.replace("eval_", "").replace(".json", "").replace("_wo_options", "")
            bars[part] = _bar(total, f"{what} {name}", "")
        bars[part].update(done - bars[part].n)

    try:
        yield update
    finally:
        for bar in bars.values():
            bar.close()


def _bar(total: int, what: str, unit: str, done: int = 0) -> "tqdm[Any]":
    pause = 0.2 if sys.stderr.isatty() else 10.0  # a log file wants few lines
    return tqdm(
        total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True, mininterval=pause,
        disable=not is_main_process(),
    )  # fmt: skip
