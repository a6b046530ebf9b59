"""The paper's claims beside the results of the ablations, counted over seeds."""

import statistics
from dataclasses import dataclass, replace

from npo_fast.experiments.ablations.results import (
    KEPT,
    Evaluations,
    Runs,
    best_quality,
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

NEVER = float("inf")


@dataclass(frozen=True)
class Claim:
    """A claim, the numbers that decide it, and in how many seeds it holds."""

    text: str
    seen: str
    holds: str


def claims(runs: Runs) -> list[Claim]:
    """The claims whose trials have been run with at least one seed in common."""
    rows = []

    def shared(*trials: Trial) -> set[int]:
        """The seeds that have run all of these trials."""
        return set.intersection(*({*runs.get(trial, ())} for trial in trials))

    for other in (GA_RT, LIMIT):
        if shared(NPO_RT, other):
            rows.append(_more_robust(runs, other))
    if shared(Trial("GA"), Trial("NPO")):
        rows.append(_slower(runs))
    methods = [trial for trial in EXPERIMENTS["methods"] if trial in runs]
    if NPO_RT in methods and shared(*methods):
        rows.append(_alone(runs, methods, shared(*methods)))
    if shared(LIMIT, Trial(beta=BETAS[0]), Trial(beta=BETAS[-1])):
        rows.append(_tends(runs))
    ends = [replace(t, overlap=o) for t in (NPO_RT, GA_RT) for o in (OVERLAPS[0], OVERLAPS[-1])]
    if shared(*ends):
        rows.append(_entangled(runs, shared(*ends)))
    return rows


def _more_robust(runs: Runs, other: Trial) -> Claim:
    pairs = [(utility_share(a), utility_share(b)) for a, b in _pairs(runs, NPO_RT, other)]
    ours, theirs = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    return _counted(
        f"NPO+RT keeps more utility than {other.name}",
        f"at the end {ours:.0%} against {theirs:.0%}",
        [a > b for a, b in pairs],
    )


def _slower(runs: Runs) -> Claim:
    steps = [
        tuple(NEVER if (s := collapse_step(run)) is None else s for run in pair)
        for pair in _pairs(runs, Trial("NPO"), Trial("GA"))
    ]
    npo, ga = (statistics.median_low(values) for values in zip(*steps, strict=True))
    return _counted(
        "Without retain data NPO collapses later than GA",
        f"median step {_step(npo)} against {_step(ga)}",
        [a > b for a, b in steps],
    )


def _alone(runs: Runs, trials: list[Trial], seeds: set[int]) -> Claim:
    passed = {
        trial.name: [best_quality(runs[trial][seed]) > MEANINGFUL for seed in sorted(seeds)]
        for trial in trials
    }
    seen = ", ".join(f"{name} {sum(flags)}" for name, flags in passed.items() if any(flags))
    npo = passed.pop(NPO_RT.name)
    return _counted(
        f"NPO+RT alone forgets (p > {MEANINGFUL}) and keeps utility (here: {KEPT:.0%})",
        f"seeds in which an evaluation does: {seen or 'none'}",
        [ok and not any(flags[i] for flags in passed.values()) for i, ok in enumerate(npo)],
    )


def _tends(runs: Runs) -> Claim:
    small, large = (
        [_distance(a, b) for a, b in _pairs(runs, Trial(beta=beta), LIMIT)]
        for beta in (BETAS[0], BETAS[-1])
    )
    return _counted(
        "NPO+RT tends to GA+RT (per sequence) as beta goes to 0",
        f"mean distance of the utility curves {statistics.fmean(small):.3f} at beta {BETAS[0]:g}, "
        f"{statistics.fmean(large):.3f} at {BETAS[-1]:g}",
        [a < b for a, b in zip(small, large, strict=True)],
    )


def _entangled(runs: Runs, seeds: set[int]) -> Claim:
    def loss(trial: Trial) -> list[float]:
        apart, shared = (runs[replace(trial, overlap=o)] for o in (OVERLAPS[0], OVERLAPS[-1]))
        return [utility_share(apart[seed]) - utility_share(shared[seed]) for seed in seeds]

    npo, ga = loss(NPO_RT), loss(GA_RT)
    return _counted(
        "Entanglement costs NPO+RT less utility than GA+RT (not a claim of the paper)",
        f"utility lost from overlap 0 to 1: {statistics.fmean(npo):+.1%} against "
        f"{statistics.fmean(ga):+.1%}",
        [a < b for a, b in zip(npo, ga, strict=True)],
    )


def _pairs(runs: Runs, a: Trial, b: Trial) -> list[tuple[Evaluations, Evaluations]]:
    """The evaluations of both trials at each seed that has both."""
    return [(runs[a][seed], runs[b][seed]) for seed in runs[a] if seed in runs[b]]


def _distance(a: Evaluations, b: Evaluations) -> float:
    """Mean distance of two curves of the utility's share."""
    shares = [abs(utility_share(a, i) - utility_share(b, i)) for i in range(len(a))]
    return statistics.fmean(shares)


def _counted(claim: str, seen: str, holds: list[bool]) -> Claim:
    return Claim(claim, seen, f"{sum(holds)} of {len(holds)} seeds")


def _step(value: float) -> str:
    return "never" if value == NEVER else f"{value:g}"
