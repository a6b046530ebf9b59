"""Results of a study: one JSON file a seed, and what is read off its looks."""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from npo_fast.errors import UserError
from npo_fast.experiments.ablations.trials import AblationSettings, Trial

COLLAPSED = 0.5  # of the utility at step 0
KEPT = 0.85  # of it: what a look must have kept to be the best
Look = Mapping[str, float]
Runs = dict[Trial, dict[int, list[Look]]]  # the looks of every seed


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and one standard deviation about it; of p-values, of their logarithm."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        mean = statistics.fmean(values)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(mean, mean - deviation, mean + deviation)


def collapse_step(looks: Sequence[Look]) -> float | None:
    """The first look below half of the starting utility after which none is back at half."""
    bound = COLLAPSED * looks[0]["model_utility"]
    first = None
    for look in looks:
        if look["model_utility"] >= bound:
            first = None
        elif first is None:
            first = look["step"]
    return first


def utility_share(looks: Sequence[Look], at: int = -1) -> float:
    """Of the utility at step 0."""
    return looks[at]["model_utility"] / looks[0]["model_utility"]


def best_quality(looks: Sequence[Look]) -> float:
    """The highest forget quality of a look that kept ``KEPT`` of the utility; step 0 is one."""
    bound = KEPT * looks[0]["model_utility"]
    return max(look["forget_quality"] for look in looks if look["model_utility"] >= bound)


def run_seed(
    seed: int,
    trials: Iterable[Trial],
    settings: AblationSettings,
    file: Path,
    provenance: Mapping[str, Any],
    tell: Callable[[str], None],
) -> None:
    """Runs the trials that ``file`` does not hold yet, and writes it anew after each."""
    content: dict[str, Any] = {
        "seed": seed,
        "settings": json.loads(json.dumps(settings.describe())),
        "time_s": 0.0,
        "runs": [],
    }
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        usual = json.loads(json.dumps(AblationSettings().describe()))
        if not _agrees(found["settings"], content["settings"], usual):
            raise UserError(f"{file} holds a study of other settings; name another folder")
        content = found
    done = {Trial(**run["trial"]) for run in content["runs"]}
    left = [trial for trial in dict.fromkeys(trials) if trial not in done]
    if not left:
        return
    from npo_fast.experiments.ablations.runner import Runner

    content["provenance"] = dict(provenance)
    started, before = time.perf_counter(), content["time_s"]
    runner = Runner(seed, settings)
    for trial in left:
        own = {"trial": asdict(trial), **runner.run(trial), "commit": provenance.get("commit")}
        content["runs"].append(own)
        content["time_s"] = before + time.perf_counter() - started
        _write(file, content)
        tell(f"seed {seed}, {trial}: {content['runs'][-1]['time_s']:.0f} s")


def _agrees(found: Any, wanted: Any, usual: Any) -> bool:
    """A setting that came after ``found`` was written counts as the ``usual`` one there."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return bool(found == wanted)
    return found.keys() <= wanted.keys() and all(
        _agrees(found.get(name, usual[name]), own, usual[name]) for name, own in wanted.items()
    )


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def load_seeds(folder: Path) -> list[dict[str, Any]]:
    """The content of every seed's file.

    Raises:
        UserError: the folder holds none.
    """
    files = sorted(folder.glob("seed-*.json"))
    if not files:
        raise UserError(f"{str(folder)!r} holds no study: no seed-*.json")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def by_trial(study: Iterable[Mapping[str, Any]]) -> Runs:
    runs: Runs = {}
    for content in study:
        for run in content["runs"]:
            runs.setdefault(Trial(**run["trial"]), {})[content["seed"]] = run["looks"]
    return runs
