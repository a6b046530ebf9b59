"""The page of the ablations: every figure over seeds, with a sentence made of its numbers."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from npo_fast import tables
from npo_fast.experiments.ablations.claims import claims
from npo_fast.experiments.ablations.results import (
    KEPT,
    Evaluations,
    Spread,
    best_quality,
    by_trial,
    collapse_step,
    utility_share,
)
from npo_fast.experiments.ablations.trials import (
    BETAS,
    EXPERIMENTS,
    GA_RT,
    LIMIT,
    NPO_RT,
    OVERLAPS,
    Trial,
)
from npo_fast.reports.figures import MEANINGFUL
from npo_fast.reports.html import Figure, render
from npo_fast.reports.seed_plots import SeedCurve, SeedPoint, seed_curves, seed_points
from npo_fast.reports.svg import SMALLEST

TITLE = "Ablations of unlearning on a small made-up data set"
UTILITY, QUALITY = "model utility, share of the start", "forget quality (KS p-value)"
NPO_BETA = 0.1  # the paper's
_FIRST = ("GA", "GA+RT", "GA+RT per sequence", "NPO", "NPO+RT")
_INDEX = {trial.name: i for i, trial in enumerate(EXPERIMENTS["methods"])}

Measure = Callable[[Evaluations], float]
Interval = tuple[float, float, float]  # mean over seeds, and one standard deviation about it


class AblationPage:
    """The HTML page of the results that ``load_seeds`` reads; it shows what has been run."""

    def __init__(self, results: Sequence[Mapping[str, Any]]) -> None:
        self.results = results
        self.runs = by_trial(results)

    def html(self) -> str:
        """The page as one HTML document without references to other files."""
        figures = {
            name: draw() if sum(trial in self.runs for trial in EXPERIMENTS[name]) > 1 else []
            for name, draw in (
                ("methods", self._methods),
                ("beta", self._beta),
                ("overlap", self._overlap),
                ("schedule", self._schedule),
            )
        }
        return render(
            "ablations",
            title=TITLE,
            claims=claims(self.runs),
            ends=self._ends(),
            provenance=self._provenance(),
            **figures,
        )

    def _methods(self) -> list[Figure]:
        """Utility and forget quality of every method over the steps, and after the last one."""
        trials = self._trials("methods")
        early = {t.name: t for t in trials if t.name in _FIRST}
        late = {t.name: t for t in trials if t.name not in _FIRST or t == NPO_RT}
        figures = []
        for part, group in (("gradient ascent and NPO", early), ("NPO+RT and the others", late)):
            key = part.split()[0].lower()
            figures += [
                Figure(
                    seed_curves(f"utility-{key}", f"Utility: {part}", "step", UTILITY,
                                self._curves(group, share=True)),
                    self._describe_collapse(group),
                ),
                Figure(
                    seed_curves(f"quality-{key}", f"Forget quality: {part}", "step", QUALITY,
                                self._curves(group, share=False), "y", MEANINGFUL),
                    self._describe_quality(group),
                ),
            ]  # fmt: skip
        ends = {
            t.name: SeedPoint(_INDEX[t.name], self._interval(t, utility_share),
                              self._interval(t, _last_quality, log=True))
            for t in trials
        }  # fmt: skip
        figures.append(
            Figure(
                seed_points("ends", "After the last step", UTILITY, QUALITY, ends, "y", MEANINGFUL),
                "Up and right is better: the forget set is forgotten, and the rest is kept.",
            )
        )
        return figures

    def _ends(self) -> tuple[tables.Cells, list[str]]:
        """Rows and header of the table of methods."""
        records = [_row(t, list(self.runs[t].values())) for t in self._trials("methods")]
        return [list(record.values()) for record in records], list(next(iter(records), {}))

    def _beta(self) -> list[Figure]:
        betas = [beta for beta in BETAS if Trial(beta=beta) in self.runs]
        lines = {NPO_RT.name: [(beta, Trial(beta=beta)) for beta in betas]}
        if LIMIT in self.runs:
            lines[LIMIT.name] = [(beta, LIMIT) for beta in (betas[0], betas[-1])]
        shown = [beta for beta in betas if beta in (betas[0], NPO_BETA, betas[-1])]
        described = {f"beta {beta:g}": Trial(beta=beta) for beta in shown}
        return self._last_step("beta", lines, "x", described | {LIMIT.name: LIMIT})

    def _overlap(self) -> list[Figure]:
        lines = {
            trial.name: [
                (overlap, replace(trial, overlap=overlap))
                for overlap in OVERLAPS
                if replace(trial, overlap=overlap) in self.runs
            ]
            for trial in (GA_RT, LIMIT, NPO_RT)
        }
        described = {
            f"{trial.name} at overlap {overlap:g}": replace(trial, overlap=overlap)
            for trial in (NPO_RT, GA_RT)
            for overlap in (OVERLAPS[0], OVERLAPS[-1])
        }
        lines = {name: points for name, points in lines.items() if points}
        return self._last_step("overlap", lines, "", described)

    def _last_step(
        self,
        x: str,
        lines: Mapping[str, list[tuple[float, Trial]]],
        log: str,
        described: Mapping[str, Trial],
    ) -> list[Figure]:
        """Utility and forget quality after the last step over the value of a setting."""
        figures = []
        for title, unit, measure, is_quality in (
            ("Utility after the last step", UTILITY, utility_share, False),
            ("Forget quality after the last step", QUALITY, _last_quality, True),
        ):
            series = {}
            for name, points in lines.items():
                intervals = [self._interval(trial, measure, log=is_quality) for _, trial in points]
                middle, low, high = zip(*intervals, strict=True)
                values = [value for value, _ in points]
                series[name] = SeedCurve(_INDEX[name], values, middle, low, high)
            svg = seed_curves(
                f"{x}-{'quality' if is_quality else 'utility'}", title, x, unit, series,
                log + "y" * is_quality, MEANINGFUL if is_quality else None,
            )  # fmt: skip
            figures.append(Figure(svg, self._describe_ends(described, is_quality)))
        return figures

    def _schedule(self) -> list[Figure]:
        group = {str(t.schedule): t for t in self._trials("schedule")}
        return [
            Figure(
                seed_curves("schedule-utility", "NPO+RT: utility", "epoch", UTILITY,
                            self._curves(group, True, "epoch", numbered=True)),
                self._describe_ends(group, False),
            ),
            Figure(
                seed_curves("schedule-quality", "NPO+RT: forget quality", "epoch", QUALITY,
                            self._curves(group, False, "epoch", numbered=True), "y", MEANINGFUL),
                self._describe_ends(group, True),
            ),
        ]  # fmt: skip

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

    def _curves(
        self, group: Mapping[str, Trial], share: bool, x: str = "step", numbered: bool = False
    ) -> dict[str, SeedCurve]:
        """Share of the starting utility, or forget quality, of each trial over ``x``."""
        curves = {}
        for n, (name, trial) in enumerate(group.items()):
            seeds = list(self.runs[trial].values())
            intervals = [
                _interval([utility_share(evaluations, i) for evaluations in seeds])
                if share
                else _interval([each[i]["forget_quality"] for each in seeds], log=True)
                for i in range(len(seeds[0]))
            ]
            middle, low, high = zip(*intervals, strict=True)
            collapse = _median_collapse(seeds, x) if share else None
            xs = [evaluation[x] for evaluation in seeds[0]]
            index = n if numbered else _INDEX[name]
            curves[name] = SeedCurve(index, xs, middle, low, high, collapse)
        return curves

    def _interval(self, trial: Trial, measure: Measure, log: bool = False) -> Interval:
        return _interval([measure(evaluations) for evaluations in self.runs[trial].values()], log)

    def _describe_collapse(self, group: Mapping[str, Trial]) -> str:
        collapsed, stable = [], []
        for name, trial in group.items():
            seeds = self.runs[trial].values()
            if steps := _collapse_steps(seeds):
                count = f"{len(steps)} of {len(seeds)} seeds"
                collapsed.append(f"{name} (step {statistics.median_low(steps):g}, {count})")
            else:
                stable.append(name)
        parts = [f"collapses with {_and(collapsed)}"] if collapsed else []
        parts += [f"does not collapse with {_and(stable)}"] if stable else []
        return f"Utility {'; it '.join(parts)}."

    def _describe_quality(self, group: Mapping[str, Trial]) -> str:
        seeds = {name: self.runs[trial].values() for name, trial in group.items()}
        counts = [
            f"{name} {sum(best_quality(evaluations) > MEANINGFUL for evaluations in each)}"
            for name, each in seeds.items()
        ]
        return (
            f"Seeds of {max(map(len, seeds.values()))} in which some evaluation is above "
            f"{MEANINGFUL} with {KEPT:.0%} of the utility left: {', '.join(counts)}."
        )

    def _describe_ends(self, trials: Mapping[str, Trial], quality: bool) -> str:
        """Forget quality or utility after the last step of those trials that have been run."""
        measure, spread = (_last_quality, powers) if quality else (utility_share, plus_minus)
        what = "Forget quality at the end, range over seeds" if quality else "Utility at the end"
        parts = [
            f"{name} {spread([measure(evaluations) for evaluations in self.runs[trial].values()])}"
            for name, trial in trials.items()
            if trial in self.runs
        ]
        return f"{what}: {'; '.join(parts)}."


def _last_quality(evaluations: Evaluations) -> float:
    return evaluations[-1]["forget_quality"]


def _interval(values: Sequence[float], log: bool = False) -> Interval:
    if not log:
        spread = Spread.of(values)
        return spread.mean, spread.low, spread.high
    spread = Spread.of([math.log10(max(value, SMALLEST)) for value in values])
    return 10**spread.mean, 10**spread.low, min(10**spread.high, 1.0)


def _collapse_steps(seeds: Iterable[Evaluations]) -> list[float]:
    """The step of collapse of each seed that collapses, smallest first."""
    return sorted(step for each in seeds if (step := collapse_step(each)) is not None)


def _median_collapse(seeds: Sequence[Evaluations], x: str = "step") -> float | None:
    """``x`` at the median step of collapse; None unless more than half of the seeds collapse."""
    steps = _collapse_steps(seeds)
    if 2 * len(steps) <= len(seeds):
        return None
    median = statistics.median_low(steps)
    return next(evaluation[x] for evaluation in seeds[0] if evaluation["step"] == median)


def _row(trial: Trial, seeds: Sequence[Evaluations]) -> dict[str, Any]:
    """Cells of one method in the table, by column."""
    steps = _collapse_steps(seeds)
    spread = f" ({steps[0]:g} to {steps[-1]:g})" if steps and steps[0] != steps[-1] else ""
    return {
        "method": trial.name,
        "collapses": f"{len(steps)} of {len(seeds)} seeds",
        "at step, median (range)": f"{statistics.median_low(steps):g}{spread}" if steps else None,
        "utility at the end": plus_minus([utility_share(each) for each in seeds]),
        "forget quality at the end": powers([_last_quality(each) for each in seeds]),
        f"best where {KEPT:.0%} of utility is kept": powers([best_quality(s) for s in seeds]),
    }


def plus_minus(values: Sequence[float]) -> str:
    """Mean and standard deviation as percentages."""
    spread = Spread.of(values)
    return f"{spread.mean:.0%} ± {spread.mean - spread.low:.0%}"


def powers(values: Sequence[float]) -> str:
    """The range of p-values, small ones as powers of ten."""
    low, high = _p(min(values)), _p(max(values))
    return low if low == high else f"{low} to {high}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
