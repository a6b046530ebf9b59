"""The paper's claims beside the results of the ablations, counted over seeds."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from npo_fast.experiments.ablations.trials import (
    BETAS,
    EXPERIMENTS,
    GA_RT,
    KEPT,
    LIMIT,
    NPO_RT,
    OVERLAP_ENDS,
    Evaluations,
    Runs,
    Trial,
    best_quality,
    collapse_step,
    utility_share,
)
from npo_fast.metrics.evidence import MEANINGFUL

NEVER = float("inf")


@dataclass(frozen=True)
class Claim:
    """A claim, the numbers that decide it, and whether it holds in each seed."""

    text: str
    seen: str
    in_seeds: list[bool]

    @property
    def holds(self) -> str:
        """In how many of the seeds, in words."""
        return f"{sum(self.in_seeds)} of {len(self.in_seeds)} seeds"


Rows = Sequence[tuple[Evaluations, ...]]  # a row a seed, a column a trial


def claims(runs: Runs) -> list[Claim]:
    """The claims whose trials have been run with at least one seed in common."""
    methods = [t for t in EXPERIMENTS["methods"] if t in runs or t == NPO_RT]
    deciders: list[tuple[Iterable[Trial], Callable[[Rows], Claim]]] = [
        ((NPO_RT, GA_RT), partial(_more_robust, GA_RT.name)),
        ((NPO_RT, LIMIT), partial(_more_robust, LIMIT.name)),
        ((Trial("NPO"), Trial("GA")), _slower),
        (methods, partial(_alone, [trial.name for trial in methods])),
        ((LIMIT, Trial(beta=BETAS[0]), Trial(beta=BETAS[-1])), _tends),
        (OVERLAP_ENDS, _entangled),
    ]
    return [decide(rows) for trials, decide in deciders if (rows := _rows(runs, trials))]


def _rows(runs: Runs, trials: Iterable[Trial]) -> Rows:
    """The evaluations of these trials at each seed that has run all of them."""
    columns = [runs.get(trial, {}) for trial in trials]
    seeds = set.intersection(*map(set, columns))
    return [tuple(column[seed] for column in columns) for seed in sorted(seeds)]


def _more_robust(other: str, rows: Rows) -> Claim:
    shares = [(utility_share(npo), utility_share(ga)) for npo, ga in rows]
    ours, theirs = map(statistics.fmean, zip(*shares, strict=True))
    return Claim(
        f"NPO+RT keeps more utility than {other}",
        f"at the end {ours:.0%} against {theirs:.0%}",
        [a > b for a, b in shares],
    )


def _slower(rows: Rows) -> Claim:
    steps = [[NEVER if (s := collapse_step(run)) is None else s for run in pair] for pair in rows]
    npo, ga = map(statistics.median_low, zip(*steps, strict=True))
    return Claim(
        "Without retain data NPO collapses later than GA",
        f"median step {_step(npo)} against {_step(ga)}",
        [a > b for a, b in steps],
    )


def _alone(names: Sequence[str], rows: Rows) -> Claim:
    passed = {
        name: [best_quality(run) > MEANINGFUL for run in column]
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }
    seen = ", ".join(f"{name} {sum(flags)}" for name, flags in passed.items() if any(flags))
    npo = passed.pop(NPO_RT.name)
    return Claim(
        f"NPO+RT alone forgets (p > {MEANINGFUL}) and keeps utility (here: {KEPT:.0%})",
        f"seeds in which an evaluation does: {seen or 'none'}",
        [ok and not any(flags[i] for flags in passed.values()) for i, ok in enumerate(npo)],
    )


def _tends(rows: Rows) -> Claim:
    distances = [(_distance(small, limit), _distance(large, limit)) for limit, small, large in rows]
    small, large = map(statistics.fmean, zip(*distances, strict=True))
    return Claim(
        "NPO+RT tends to GA+RT (per sequence) as beta goes to 0",
        f"mean distance of the utility curves {small:.3f} at beta {BETAS[0]:g}, "
        f"{large:.3f} at {BETAS[-1]:g}",
        [a < b for a, b in distances],
    )


def _entangled(rows: Rows) -> Claim:
    shares = [[utility_share(run) for run in row] for row in rows]
    lost = [(npo - npo_shared, ga - ga_shared) for npo, npo_shared, ga, ga_shared in shares]
    npo, ga = map(statistics.fmean, zip(*lost, strict=True))
    return Claim(
        "Entanglement costs NPO+RT less utility than GA+RT (not a claim of the paper)",
        f"utility lost from overlap 0 to 1: {npo:+.1%} against {ga:+.1%}",
        [a < b for a, b in lost],
    )


def _distance(a: Evaluations, b: Evaluations) -> float:
    """Mean distance of two curves of the utility's share."""
    return statistics.fmean(abs(utility_share(a, i) - utility_share(b, i)) for i in range(len(a)))


def _step(value: float) -> str:
    return "never" if value == NEVER else f"{value:g}"
