"""Results of the ablations: one JSON file a seed, and measures of its evaluations."""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from npo_fast.errors import UserError
from npo_fast.experiments.ablations.trials import AblationSettings, Trial

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


def run_seed(
    seed: int,
    trials: Iterable[Trial],
    settings: AblationSettings,
    file: Path,
    provenance: Mapping[str, Any],
    log: Callable[[str], None],
) -> None:
    """Runs the trials that ``file`` does not hold yet, and writes the file after each.

    Raises:
        UserError: the file holds results of other settings.
    """
    wanted, defaults = (json.loads(json.dumps(asdict(x))) for x in (settings, AblationSettings()))
    content: dict[str, Any] = {"seed": seed, "settings": wanted, "time_s": 0.0, "runs": []}
    if file.exists():
        content = json.loads(file.read_text(encoding="utf-8"))
        if not _agrees(content["settings"], wanted, defaults):
            raise UserError(f"{file} holds ablations of other settings; name another folder")
    done = {Trial(**run["trial"]) for run in content["runs"]}
    left = [trial for trial in dict.fromkeys(trials) if trial not in done]
    if not left:
        return
    from npo_fast.experiments.ablations.runner import Runner

    content["provenance"] = dict(provenance)
    started, before = time.perf_counter(), content["time_s"]
    runner = Runner(seed, settings)
    for trial in left:
        run = {"trial": asdict(trial), **runner.run(trial), "commit": provenance.get("commit")}
        content["runs"].append(run)
        content["time_s"] = before + time.perf_counter() - started
        _write(file, content)
        log(f"seed {seed}, {trial}: {run['time_s']:.0f} s")


def _agrees(stored: Any, wanted: Any, defaults: Any) -> bool:
    """Whether stored settings are those that are wanted; one that is not stored is the default."""
    if not (isinstance(stored, dict) and isinstance(wanted, dict)):
        return bool(stored == wanted)
    return stored.keys() <= wanted.keys() and all(
        _agrees(stored.get(name, defaults[name]), value, defaults[name])
        for name, value in wanted.items()
    )


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


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
