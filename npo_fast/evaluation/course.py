"""Measures in the course of an unlearning run: one record a look, and which look was the best."""

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_fast import metrics
from npo_fast.errors import UserError

_KNOWLEDGE = ("probability", "rouge_l_recall", "exact_memorization", "extraction_strength")
_OF_A_SET = (*_KNOWLEDGE, "truth_ratio")
_PRINTED = {"rouge_l_recall": "ROUGE-L"}  # where ``metrics.summary`` spells it in its own way
MEASURES = {  # name -> +1 where more of it is better, -1 where less is
    "forget_quality": 1,
    "model_utility": 1,
    **{f"forget.{name}": -1 for name in _KNOWLEDGE},
    "forget.truth_ratio": 1,
    **{f"retain.{name}": 1 for name in _OF_A_SET},
}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


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
            _known(self.keep_best)
        if self.stop_when is not None:
            Condition.parse(self.stop_when)
        for name in ("retrained", "keep_best", "stop_when", "min_utility"):
            if getattr(self, name) and not self.eval_every:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} looks at evaluations: add --eval-every STEPS")
        if self.min_utility and self.keep_best is None:
            raise UserError("--min-utility limits what --keep-best may keep: add --keep-best")


@dataclass(frozen=True)
class Condition:
    """``measure > bound``, or with >=, < or <=."""

    measure: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        match = re.fullmatch(r"\s*([\w.]+)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        try:
            measure, sign, bound = match.groups() if match else ("", "", "")
            number = float(bound)
        except ValueError:
            raise UserError(
                f"cannot read the condition {text!r}: write it as 'forget_quality>0.05'"
            ) from None
        return cls(_known(measure), sign, number)

    def holds(self, look: Mapping[str, Any]) -> bool:
        return _COMPARE[self.sign](value_of(look, self.measure), self.bound)


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
        gain = MEASURES[measure] * value_of(self.last, measure)
        if self.best and not gain > MEASURES[measure] * value_of(self.best, measure):
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


def measures(result: metrics.Result, retrained: metrics.Result | None = None) -> dict[str, Any]:
    """What ``MEASURES`` names, as far as the result allows.

    The truth ratio is TOFU's: mean ``min(ratio, 1 / ratio)`` on the forget set, and
    ``max(0, 1 - ratio)``, which falls where knowledge is lost, on the retain set.
    """
    numbers = metrics.summary(result, retrained)
    spelled = {"forget quality": "forget_quality", "model utility": "model_utility"}
    found: dict[str, Any] = {key: numbers[name] for name, key in spelled.items() if name in numbers}
    for part in ("forget", "retain"):
        keys = {f"{part} {_PRINTED.get(key, key.replace('_', ' '))}": key for key in _OF_A_SET}
        own = {key: numbers[name] for name, key in keys.items() if name in numbers}
        if own:
            found[part] = own
    return found


def value_of(look: Mapping[str, Any], measure: str) -> float:
    """
    Raises:
        UserError: the look has no such measure; the message says what it takes.
    """
    value: Any = look
    for key in measure.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None:
        raise UserError(
            f"{measure} cannot be measured here: forget_quality takes --retrained and a forget set "
            "with wrong answers, model_utility a retain set, real authors and world facts with "
            "wrong answers, retain measures take --retain"
        )
    return float(value)


def _known(measure: str) -> str:
    if measure not in MEASURES:
        near = difflib.get_close_matches(measure, MEASURES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown measure {measure!r}{hint} Known: {', '.join(MEASURES)}")
    return measure
