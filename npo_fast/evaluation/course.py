"""Measures in the course of an unlearning run: one record a look, and which look was the best."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_fast import metrics
from npo_fast.errors import UserError
from npo_fast.metrics.measures import Condition, find_measure, measures, value_of


@dataclass(frozen=True)
class WatchOptions:
    """Evaluation while training: ``evaluations.jsonl`` in the run folder."""

    eval_every: int = 0
    """Steps between evaluations, step 0 and the last step among them; 0 makes none."""
    eval_records: int = 40
    """First records of each set to measure; fewer make forget quality a weaker test."""
    retrained: Path | None = None
    """Log of a model trained without the forget set, on all its items: for forget quality."""
    keep_best: str | None = None
    """Measure by which the best evaluated step, not the last, becomes the final model."""
    min_utility: float = 0.0
    """Share of the start's model utility that a step must keep to be the best."""
    stop_when: str | None = None
    """Condition that ends the run at an evaluation, such as 'forget_quality>0.05'."""

    def __post_init__(self) -> None:
        for name in ("eval_every", "eval_records", "min_utility"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.eval_every and not self.eval_records:
            raise UserError("eval_records must be at least 1, got 0")
        if self.keep_best is not None:
            find_measure(self.keep_best)
        if self.stop_when is not None:
            Condition.parse(self.stop_when)
        for name in ("retrained", "keep_best", "stop_when", "min_utility"):
            if getattr(self, name) and not self.eval_every:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} looks at evaluations: add --eval-every STEPS")
        if self.min_utility and self.keep_best is None:
            raise UserError("--min-utility limits what --keep-best may keep: add --keep-best")


class Course:
    """Looks at a model again and again, remembers the best look, and says when to stop."""

    def __init__(
        self,
        options: WatchOptions,
        evaluate: Callable[[], metrics.Result],
        retrained: metrics.Result | None = None,  # on the same items as ``evaluate``
    ) -> None:
        self.options, self.evaluate, self.retrained = options, evaluate, retrained
        self.stop = None if options.stop_when is None else Condition.parse(options.stop_when)
        self.start: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.best: dict[str, Any] = {}  # empty until a look after step 0 qualifies

    def begin(self) -> dict[str, Any]:
        """The look at step 0.

        Raises:
            UserError: what is asked for cannot be measured on this data.
        """
        self.start = self.last = self._look(0, 0.0)
        needed = [self.options.keep_best, self.stop.measure if self.stop else None]
        needed.append("model_utility" if self.options.min_utility else None)
        for measure in filter(None, needed):
            value_of(self.start, measure)
        if self.options.min_utility and not self.start["model_utility"] > 0:
            raise UserError(
                "--min-utility is a share of the utility at the start, and that is 0: leave it out"
            )
        return self.start

    def go_on(self, looks: Sequence[dict[str, Any]], best: dict[str, Any]) -> None:
        """As if it had taken these looks, of which ``best`` was the best."""
        self.start, self.last, self.best = looks[0], looks[-1], best

    def due(self, step: int, steps: int) -> bool:
        return step % self.options.eval_every == 0 or step == steps

    def look(self, step: int, epoch: float) -> bool:
        """Measures the model as it is now (``last``); true where it is the ``best`` so far."""
        self.last = self._look(step, epoch)
        measure = self.options.keep_best
        if measure is None or not self._keeps_utility():
            return False
        direction = find_measure(measure).direction
        gain = direction * value_of(self.last, measure)
        if self.best and not gain > direction * value_of(self.best, measure):
            return False
        self.best = self.last
        return True

    def over(self) -> bool:
        return self.stop is not None and self.stop.holds(self.last)

    def _keeps_utility(self) -> bool:
        share = self.options.min_utility
        return not share or self.last["model_utility"] >= share * self.start["model_utility"]

    def _look(self, step: int, epoch: float) -> dict[str, Any]:
        return {"step": step, "epoch": epoch, **measures(self.evaluate(), self.retrained)}
