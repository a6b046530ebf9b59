"""What a verdict follows from: measures of a model, and of those it is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from npo_fast.metrics.measures import find_measure, score
from npo_fast.tables import number

Scores = Mapping[str, Any]  # nested, as ``measures`` returns them
Interval = tuple[float, float]

MEANINGFUL = 0.05  # p-value below which two models can be told apart


@dataclass(frozen=True)
class Level:
    """Median log-probs of whole forget answers, in nats."""

    reference: float
    """Under the model before unlearning."""
    unknown: float
    """Under a model that never knew it."""
    source: str
    """What told ``unknown``."""

    def gone(self, log_prob: float) -> float | None:
        """The share of the way from ``reference`` to ``unknown``; above 1 it is beyond.

        None where the reference does not know the answers better.
        """
        way = self.reference - self.unknown
        return (self.reference - log_prob) / way if way > 0 else None


@dataclass(frozen=True)
class Evidence:
    """What was measured of a model, and of models to compare it with; {} where there is none."""

    after: Scores
    before: Scores = field(default_factory=dict)
    retrained: Scores = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # of ``after``, by key
    records: int | None = None  # forget records measured
    level: Level | None = None  # where a model stands that never knew them, ...
    log_prob: float | None = None  # ... and where this one stands

    @property
    def kept_by(self) -> tuple[str, Scores]:
        """A model that knows the retain set, and its name: the one before, else the retrained."""
        return ("before", self.before) if self.before.get("retain") else (
            "retrained", self.retrained
        )  # fmt: skip

    @property
    def quality(self) -> float | None:
        """The forget quality; None where as many records could not fall below 0.05."""
        smallest = score(self.after, "smallest_forget_quality")
        if smallest is not None and smallest >= MEANINGFUL:
            return None
        return score(self.after, "forget_quality")

    @property
    def gone(self) -> float | None:
        """How far it went from what it knew to where it never knew, where that was measured."""
        if self.level is None or self.log_prob is None:
            return None
        return self.level.gone(self.log_prob)

    @property
    def way(self) -> str:
        """The same in words; empty where it was not measured."""
        if self.level is None or self.log_prob is None:
            return ""
        old, never = number(self.level.reference), number(self.level.unknown)
        now = number(self.log_prob)
        return f"median log-prob of a forget answer {old} -> {now} (never known {never})"

    @property
    def told_apart(self) -> str | None:
        """The forget quality in words, where it tells the model from the retrained one."""
        quality = self.quality
        if quality is None or quality >= MEANINGFUL:
            return None
        return f"forget quality {number(quality)}"

    def change(self, key: str, name: str = "before", other: Scores | None = None) -> str:
        """A measure of both models in words: "forget probability 0.97 -> 0.06"."""
        old = score(self.before if other is None else other, key)
        new = score(self.after, key)
        label = find_measure(key).label
        if new is None:
            return ""
        if old is None:
            return f"{label} {number(new)}"
        if name == "before":
            return f"{label} {number(old)} -> {number(new)}"
        return f"{label} {number(new)} ({name} {number(old)})"
