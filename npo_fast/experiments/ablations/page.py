"""The page of the ablations: every figure over seeds, with a sentence made of its numbers."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npo_fast import tables
from npo_fast.experiments.ablations.claims import claims
from npo_fast.experiments.ablations.trials import (
    BETAS,
    EXPERIMENTS,
    KEPT,
    LIMIT,
    NPO_RT,
    OVERLAP_ENDS,
    Evaluations,
    Spread,
    Trial,
    best_quality,
    by_trial,
    collapse_step,
    utility_share,
)
from npo_fast.metrics.evidence import MEANINGFUL
from npo_fast.reports.html import render
from npo_fast.reports.svg import SMALLEST, Figure, Frame, SeedCurve, seed_curves, seed_points

TITLE = "Ablations of unlearning on a small made-up data set"
NPO_BETA = 0.1  # the paper's
_FIRST = ("GA", "GA+RT", "GA+RT per sequence", "NPO", "NPO+RT")
_INDEX = {trial.name: i for i, trial in enumerate(EXPERIMENTS["methods"])}

Seeds = Sequence[Evaluations]  # the evaluations of a trial, by seed
Group = Mapping[str, Seeds]  # of several trials, by name


@dataclass(frozen=True)
class Quantity:
    """A number of an evaluation, and how figures and captions show it over seeds."""

    key: str
    name: str
    axis: str
    value: Callable[[Evaluations, int], float]  # at the evaluation with this index
    at_end: str  # begins a caption about the last evaluation
    summary: Callable[[Sequence[float]], str]  # of one value a seed
    log: bool = False
    line: float | None = None  # a level to compare with

    def values(self, seeds: Seeds, index: int = -1) -> list[float]:
        """The value of each seed, by default at its last evaluation."""
        return [self.value(evaluations, index) for evaluations in seeds]

    def spread(self, seeds: Seeds, index: int = -1) -> Spread:
        """The spread of ``values``; that of their logarithms where the axis is logarithmic."""
        values = self.values(seeds, index)
        if not self.log:
            return Spread.of(values)
        mean, low, high = Spread.of([math.log10(max(value, SMALLEST)) for value in values])
        return Spread(10**mean, 10**low, min(10**high, 1.0))

    def describe_ends(self, group: Group) -> str:
        """A caption about the last evaluation of these trials."""
        parts = [f"{name} {self.summary(self.values(seeds))}" for name, seeds in group.items()]
        return f"{self.at_end}: {'; '.join(parts)}."

    def frame(self, key: str, title: str, x: str, caption: str, log: str = "") -> Frame:
        """The frame of a figure of this quantity over ``x``."""
        return Frame(key, title, x, self.axis, log + "y" * self.log, self.line, caption)


def plus_minus(values: Sequence[float]) -> str:
    """Mean and standard deviation as percentages."""
    spread = Spread.of(values)
    return f"{spread.mean:.0%} ± {spread.mean - spread.low:.0%}"


def powers(values: Sequence[float]) -> str:
    """The range of p-values, small ones as powers of ten."""
    low, high = _p(min(values)), _p(max(values))
    return low if low == high else f"{low} to {high}"


UTILITY = Quantity(
    "utility", "utility", "model utility, share of the start", utility_share,
    "Utility at the end", plus_minus,
)  # fmt: skip
QUALITY = Quantity(
    "quality", "forget quality", "forget quality (KS p-value)",
    lambda evaluations, index: evaluations[index]["forget_quality"],
    "Forget quality at the end, range over seeds", powers, log=True, line=MEANINGFUL,
)  # fmt: skip


class AblationPage:
    """The HTML page of the results that ``load_seeds`` reads; it shows what has been run."""

    def __init__(self, results: Sequence[Mapping[str, Any]]) -> None:
        self.results = results
        self.runs = {trial: [*seeds.values()] for trial, seeds in by_trial(results).items()}

    def html(self) -> str:
        """The page as one HTML document without references to other files."""
        settings = {"beta": self._beta, "overlap": self._overlap, "schedule": self._schedule}
        several = [name for name in EXPERIMENTS if len(self._trials(name)) > 1]
        figures = {
            name: [draw(UTILITY), draw(QUALITY)] if name in several else []
            for name, draw in settings.items()
        }
        return render(
            "ablations",
            title=TITLE,
            claims=claims(by_trial(self.results)),
            methods=self._methods() if "methods" in several else [],
            ends=tables.from_records([_row(t, self.runs[t]) for t in self._trials("methods")]),
            provenance=self._provenance(),
            **figures,
        )

    def _methods(self) -> list[Figure]:
        """Utility and forget quality of every method over the steps, and after the last one."""
        methods = {trial.name: self.runs[trial] for trial in self._trials("methods")}
        early = {name: seeds for name, seeds in methods.items() if name in _FIRST}
        late = {n: seeds for n, seeds in methods.items() if n not in _FIRST or n == NPO_RT.name}
        figures = []
        for part, group in (("gradient ascent and NPO", early), ("NPO+RT and the others", late)):
            if not group:
                continue
            key = part.split()[0].lower()
            for quantity, describe in ((UTILITY, _describe_collapse), (QUALITY, _describe_quality)):
                title, caption = f"{quantity.name}: {part}", describe(group)
                frame = quantity.frame(f"{quantity.key}-{key}", title, "step", caption)
                figures.append(_over_time(frame, quantity, group))
        ends = {
            name: (_INDEX[name], UTILITY.spread(seeds), QUALITY.spread(seeds))
            for name, seeds in methods.items()
        }
        caption = "Up and right is better: the forget set is forgotten, and the rest is kept."
        frame = QUALITY.frame("ends", "After the last step", UTILITY.axis, caption)
        return [*figures, seed_points(frame, ends)]

    def _beta(self, quantity: Quantity) -> Figure:
        betas = [beta for beta in BETAS if Trial(beta=beta) in self.runs]
        ends = betas[0], betas[-1]
        points = [(beta, Trial(beta=beta)) for beta in betas] + [(beta, LIMIT) for beta in ends]
        shown = {f"beta {b:g}": Trial(beta=b) for b in betas if b in (NPO_BETA, *ends)}
        return self._last_step(quantity, "beta", points, shown | {LIMIT.name: LIMIT}, log="x")

    def _overlap(self, quantity: Quantity) -> Figure:
        trials = sorted(self._trials("overlap"), key=lambda trial: _INDEX[trial.name])
        points = [(trial.overlap, trial) for trial in trials]
        shown = {f"{trial.name} at overlap {trial.overlap:g}": trial for trial in OVERLAP_ENDS}
        return self._last_step(quantity, "overlap", points, shown)

    def _last_step(
        self,
        quantity: Quantity,
        setting: str,
        points: Iterable[tuple[float, Trial]],  # values of the setting, with their trials
        described: Mapping[str, Trial],  # the trials of the caption, by name
        log: str = "",
    ) -> Figure:
        """A quantity after the last step over the value of a setting."""
        lines: dict[str, list[tuple[float, Spread]]] = {}
        for value, trial in points:
            if seeds := self.runs.get(trial):
                lines.setdefault(trial.name, []).append((value, quantity.spread(seeds)))
        series = {name: SeedCurve(_INDEX[name], line) for name, line in lines.items()}
        group = {name: self.runs[trial] for name, trial in described.items() if trial in self.runs}
        title, caption = f"{quantity.name} after the last step", quantity.describe_ends(group)
        frame = quantity.frame(f"{setting}-{quantity.key}", title, setting, caption, log)
        return seed_curves(frame, series)

    def _schedule(self, quantity: Quantity) -> Figure:
        group = {str(trial.schedule): self.runs[trial] for trial in self._trials("schedule")}
        title, caption = f"NPO+RT: {quantity.name}", quantity.describe_ends(group)
        frame = quantity.frame(f"schedule-{quantity.key}", title, "epoch", caption)
        return _over_time(frame, quantity, group)

    def _provenance(self) -> tuple[tables.Cells, list[str]]:
        """Rows and header of the table of seeds, settings and versions."""
        first = self.results[0]
        settings = first["settings"]
        unlearning = settings["unlearning"]
        commits = sorted({str(seed["provenance"].get("commit"))[:12] for seed in self.results})
        minutes = sum(seed["time_s"] for seed in self.results) / 60
        values = {
            "seeds": ", ".join(str(seed["seed"]) for seed in self.results),
            "commit": ", ".join(commits),
            "time": f"{minutes:.0f} min in all, one thread of a shared machine",
            "learning rate, every method": f"{unlearning['lr']:g}",
            "passes over the forget data": unlearning["epochs"],
            "batch": unlearning["batch_size"],
            "retain coefficient, every +RT": f"{settings['retain']:g}",
            **first["provenance"]["versions"],
        }
        return [list(item) for item in values.items()], ["", "value"]

    def _trials(self, experiment: str) -> list[Trial]:
        """The trials of an experiment that have been run."""
        return [trial for trial in EXPERIMENTS[experiment] if trial in self.runs]


def _over_time(frame: Frame, quantity: Quantity, group: Group) -> Figure:
    """A quantity of each trial over steps or epochs; a cross marks the collapse of utility."""
    curves = {}
    for n, (name, seeds) in enumerate(group.items()):
        points = [(e[frame.x], quantity.spread(seeds, i)) for i, e in enumerate(seeds[0])]
        collapse = _median_collapse(seeds, frame.x) if quantity is UTILITY else None
        curves[name] = SeedCurve(_INDEX.get(name, n), points, collapse)
    return seed_curves(frame, curves)


def _describe_collapse(group: Group) -> str:
    collapsed, stable = [], []
    for name, seeds in group.items():
        if steps := _collapse_steps(seeds):
            count = f"{len(steps)} of {len(seeds)} seeds"
            collapsed.append(f"{name} (step {statistics.median_low(steps):g}, {count})")
        else:
            stable.append(name)
    parts = [f"collapses with {_and(collapsed)}"] if collapsed else []
    parts += [f"does not collapse with {_and(stable)}"] if stable else []
    return f"Utility {'; it '.join(parts)}."


def _describe_quality(group: Group) -> str:
    counts = [
        f"{name} {sum(best_quality(evaluations) > MEANINGFUL for evaluations in seeds)}"
        for name, seeds in group.items()
    ]
    return (
        f"Seeds of {max(map(len, group.values()))} in which some evaluation is above {MEANINGFUL} "
        f"with {KEPT:.0%} of the utility left: {', '.join(counts)}."
    )


def _collapse_steps(seeds: Iterable[Evaluations]) -> list[float]:
    """The step of collapse of each seed that collapses, smallest first."""
    return sorted(step for each in seeds if (step := collapse_step(each)) is not None)


def _median_collapse(seeds: Seeds, x: str) -> float | None:
    """``x`` at the median step of collapse; None unless more than half of the seeds collapse."""
    steps = _collapse_steps(seeds)
    if 2 * len(steps) <= len(seeds):
        return None
    median = statistics.median_low(steps)
    return next(evaluation[x] for evaluation in seeds[0] if evaluation["step"] == median)


def _row(trial: Trial, seeds: Seeds) -> dict[str, Any]:
    """Cells of one method in the table, by column."""
    steps = _collapse_steps(seeds)
    spread = f" ({steps[0]:g} to {steps[-1]:g})" if steps and steps[0] != steps[-1] else ""
    return {
        "method": trial.name,
        "collapses": f"{len(steps)} of {len(seeds)} seeds",
        "at step, median (range)": f"{statistics.median_low(steps):g}{spread}" if steps else None,
        "utility at the end": plus_minus(UTILITY.values(seeds)),
        "forget quality at the end": powers(QUALITY.values(seeds)),
        f"best where {KEPT:.0%} of utility is kept": powers([best_quality(s) for s in seeds]),
    }


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
