"""Progress bars, on standard error of the first process. ``TQDM_DISABLE=1`` turns them off."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from tqdm import tqdm

from npo_fast.distributed import is_main_process
from npo_fast.runs.callbacks import Callback
from npo_fast.tables import printable
from npo_fast.trainer.settings import StepRecord


class ProgressBar(Callback):
    """A bar over the steps with the loss terms, the gradient norm and the time left."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm[Any] | None = None

    def on_step(self, record: StepRecord) -> None:
        if self.bar is None:
            self.bar = _bar(record.steps, self.title, "step", record.step - 1)
        terms = {name: f"{value:.3g}" for name, value in record.terms.items()}
        self.bar.set_postfix({**terms, "grad": f"{record.grad_norm:.2g}"}, refresh=False)
        self.bar.update()

    def on_trained(self) -> None:
        self.on_end()

    def on_end(self) -> None:
        if self.bar is not None:
            self.bar.close()


@contextmanager
def progress(title: str) -> Iterator[Any]:
    """A function ``(part, done, total)`` that draws one bar a part."""
    bars: dict[str, tqdm[Any]] = {}
    with ExitStack() as current:

        def update(part: str, done: int, total: int) -> None:
            if part not in bars:
                current.close()
                name = part.replace("eval_", "").replace(".json", "").replace("_wo_options", "")
                bars[part] = current.enter_context(_bar(total, f"{title} {name}", ""))
            bars[part].update(done - bars[part].n)

        yield update


def silence() -> None:
    """Draws no more bars in this process: another one has the terminal."""
    _Bar.silent = True


def _bar(total: int, title: str, unit: str, done: int = 0) -> "tqdm[Any]":
    pause = 0.2 if sys.stderr.isatty() else 10.0  # a log file wants few lines
    disable = _Bar.silent or not is_main_process()
    silent: dict[str, Any] = {"disable": True} if disable else {}  # False beats TQDM_DISABLE
    options = {"unit": unit, "dynamic_ncols": True, "mininterval": pause, **silent}
    return _Bar(total=total, initial=done, desc=printable(title), **options)


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar that standard error need not take: it may be a file on a full disk."""

    silent = False

    def display(self, *arguments: Any, **options: Any) -> Any:
        with suppress(OSError):
            return super().display(*arguments, **options)
        return None

    def close(self) -> None:
        with suppress(OSError):
            super().close()
