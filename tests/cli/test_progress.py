"""Progress tells the truth: rates of steps alone; a few lines in a log, a bar on a terminal."""

import io
import sys
from types import SimpleNamespace

import pytest

from npo_fast.runs import progress as module
from npo_fast.runs.progress import ProgressBar, progress
from npo_fast.trainer.settings import StepRecord


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, time_ms: float, steps: int = 100) -> StepRecord:
    return StepRecord(
        step=step, steps=steps, epoch=1.0, loss=1.0, terms={"NPO": 1.0}, log_probs={},
        grad_norm=1.0, lr=1.0, tokens=1, micro_batch_tokens=1, time_ms=time_ms,
    )  # fmt: skip


def start(bar: ProgressBar, steps: int, done: int) -> None:
    bar.on_start(
        SimpleNamespace(
            folder=SimpleNamespace(metadata={"steps": steps}), state=SimpleNamespace(step=done)
        )
    )


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_the_rate_is_that_of_the_steps_and_not_of_pauses_or_earlier_steps(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    bar = ProgressBar("npo")
    start(bar, 100, 90)  # 90 steps are of an earlier process
    for step in range(91, 96):
        bar.on_step(record(step, 2000.0))  # at once, as the clock sees it
    assert bar.bar.rate == pytest.approx(0.5)
    bar.bar.display() if stream is Terminal else bar.bar._print()
    assert "2.00s/step" in sys.stderr.getvalue()
    assert "95/100" in sys.stderr.getvalue()
    assert "<00:10" in sys.stderr.getvalue(), "five steps are left"


def test_the_bar_stands_before_the_first_step_ends(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    start(ProgressBar("npo"), 100, 0)
    assert "0/100" in sys.stderr.getvalue()
    with progress("before") as update:
        update("eval_log_forget.json answers", 0, 20)
        assert "before forget answers:   0%" in sys.stderr.getvalue()


def test_a_log_has_few_lines_and_no_carriage_returns(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    bar = ProgressBar("npo")
    start(bar, 36_000, 0)
    for step in range(1, 36_001):  # ten hours
        now[0] += 1.0
        bar.on_step(record(step, 1000.0, 36_000))
    bar.on_end()
    written = sys.stderr.getvalue()
    lines = written.splitlines()
    assert 50 < len(lines) < 200
    assert "\r" not in written
    assert lines[0].startswith("npo:   0%")
    assert "36000/36000" in lines[-1]


def test_what_is_quick_leaves_no_line_in_a_log(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress("before") as update:
        for done in range(21):
            update("forget", done, 20)
    assert sys.stderr.getvalue() == ""
