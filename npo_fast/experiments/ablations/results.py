"""Results of the ablations: one JSON file a seed, and measures of its evaluations."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from npo_fast.errors import UserError
from npo_fast.experiments.ablations.trials import Trial

COLLAPSED = 0.5  # of the utility at step 0
KEPT = 0.85  # of it: what an evaluation must have kept to be the best
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
    first = None
    for evaluation in evaluations:
        if evaluation["model_utility"] >= bound:
            first = None
        elif first is None:
            first = evaluation["step"]
    return first


def utility_share(evaluations: Evaluations, index: int = -1) -> float:
    """Utility at an evaluation (the last one by default) as a share of that at step 0."""
    return evaluations[index]["model_utility"] / evaluations[0]["model_utility"]


def forget_quality(evaluations: Evaluations, index: int = -1) -> float:
    """Forget quality at an evaluation, by default the last one."""
    return evaluations[index]["forget_quality"]


def best_quality(evaluations: Evaluations) -> float:
    """The highest forget quality of an evaluation (step 0 counts) that kept enough utility.

    Enough is the share ``KEPT`` of the utility at step 0.
    """
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
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def by_trial(results: Iterable[Mapping[str, Any]]) -> Runs:
    """The evaluations of each trial and seed."""
    runs: Runs = {}
    for content in results:
        for run in content["runs"]:
            runs.setdefault(Trial(**run["trial"]), {})[content["seed"]] = run["looks"]
    return runs
