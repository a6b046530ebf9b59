"""Trials (one unlearning run each), the experiments that they make up, and their results."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from npo_fast.boundary import read_json
from npo_fast.errors import UserError
from npo_fast.experiments.demo.experiment import DemoSettings
from npo_fast.methods import Coefficients, Schedule, Term, build_method, coefficients_of
from npo_fast.trainer.settings import TrainSettings

COLLAPSED = 0.5  # of the utility at step 0
KEPT = 0.85  # of it: what an evaluation must have kept for ``best_quality``
HALF_WAY = 0.5  # the overlap of every experiment that is not about it
SMALL = DemoSettings(background=24, famous=10, authors=20, forget_share=0.5)  # half the demo's


class SeedFile(TypedDict):
    """The results of all trials of one seed, as far as the file is checked."""

    settings: dict[str, Any]
    time_s: float
    runs: list[dict[str, Any]]


@dataclass(frozen=True)
class Trial:
    """One way to unlearn; it is run once per seed."""

    method: str = "NPO+RT"
    beta: float | None = None  # None: the method's own
    overlap: float = HALF_WAY  # of forgotten facts with kept ones
    schedule: Schedule = "summed"
    per_sequence: bool = False  # the mean of GA over sequences, as NPO's, instead of over tokens

    @property
    def name(self) -> str:
        """The method as the page names it."""
        return f"{self.method} per sequence" if self.per_sequence else self.method

    def terms(self, retain: float) -> tuple[Term, ...]:
        """The terms of the method, with ``retain`` as coefficient of its retain term if it has one.

        Raises:
            ValueError: a beta for a method that has none.
        """
        wanted = Coefficients(beta=self.beta, retain=retain)
        if self.beta is not None and "beta" not in coefficients_of(self.method):
            raise ValueError(f"{self.method} has no beta, got {self.beta}")
        terms = build_method(self.method, wanted.for_method(self.method))
        if not self.per_sequence:
            return terms
        return tuple(replace(t, reduction="mean") if t.name == "GA" else t for t in terms)


@dataclass(frozen=True)
class AblationSettings:
    """Sizes, and the one learning rate, number of passes and retain coefficient of all trials.

    The names of the fields are keys of the committed results.
    """

    world: DemoSettings = SMALL  # size of the data set, and how the model is trained before
    unlearning: TrainSettings = TrainSettings(epochs=12, lr=1e-3, micro_batch_tokens=4096)
    retain: float = 5.0  # the paper's, to forget half
    looks_every: int = 4  # batches of forget data between evaluations
    look_records: int = 20  # first records of each set to keep, for the utility
    look_tokens: int = 14  # longest answer there


NPO_RT, GA_RT = Trial("NPO+RT"), Trial("GA+RT")
LIMIT = Trial("GA+RT", per_sequence=True)  # what NPO+RT tends to as beta -> 0
BETAS = (0.01, 0.03, 0.1, 0.3, 1.0, 10.0)
OVERLAPS = (0.0, 0.5, 1.0)
OVERLAP_ENDS = [replace(trial, overlap=end) for trial in (NPO_RT, GA_RT) for end in (0.0, 1.0)]
EXPERIMENTS: dict[str, tuple[Trial, ...]] = {
    "methods": (
        Trial("GA"), GA_RT, LIMIT, Trial("NPO"), NPO_RT,
        *map(Trial, ("SimNPO+RT", "DPO+RT", "KTO+RT", "IDK+RT")),
    ),
    "beta": tuple(Trial(beta=beta) for beta in BETAS),
    "schedule": (NPO_RT, Trial(schedule="alternating")),
    "overlap": tuple(
        replace(trial, overlap=overlap) for overlap in OVERLAPS for trial in (NPO_RT, GA_RT, LIMIT)
    ),
}  # fmt: skip
Evaluations = Sequence[Mapping[str, float]]  # of one run, step 0 first
Runs = dict[Trial, dict[int, Evaluations]]  # by seed


class Spread(NamedTuple):
    """A mean over seeds and one standard deviation about it."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of one value per seed; of one seed it has no width."""
        mean = statistics.fmean(values)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(mean, mean - deviation, mean + deviation)


def collapse_step(evaluations: Evaluations) -> float | None:
    """The step after which utility stays below half of what it was at step 0; None if none is."""
    bound = COLLAPSED * evaluations[0]["model_utility"]
    below = [*takewhile(lambda e: e["model_utility"] < bound, reversed(evaluations))]
    return below[-1]["step"] if below else None


def utility_share(evaluations: Evaluations, index: int = -1) -> float:
    """Utility at an evaluation (the last one by default) as a share of that at step 0."""
    return evaluations[index]["model_utility"] / evaluations[0]["model_utility"]


def best_quality(evaluations: Evaluations) -> float:
    """The highest forget quality of those evaluations, step 0 among them, that kept utility."""
    bound = KEPT * evaluations[0]["model_utility"]
    return max(e["forget_quality"] for e in evaluations if e["model_utility"] >= bound)


def load_seeds(folder: Path) -> list[dict[str, Any]]:
    """Reads the file of every seed.

    Raises:
        UserError: the folder holds none.
    """
    files = sorted(folder.glob("seed-*.json"))
    if not files:
        raise UserError(f"{str(folder)!r} holds no ablations: no seed-*.json")
    return [read_json(file, SeedFile) for file in files]


def by_trial(results: Iterable[Mapping[str, Any]]) -> Runs:
    """The evaluations of each trial and seed."""
    runs: Runs = {}
    for content in results:
        for run in content["runs"]:
            runs.setdefault(Trial(**run["trial"]), {})[content["seed"]] = run["looks"]
    return runs
