"""The paper's claims about its experiment beside our results. Source: arXiv 2404.05868."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npo_fast import tables
from npo_fast.experiments.synthetic.experiment import BETAS, Curves, Experiment
from npo_fast.experiments.synthetic.theory import Theory

START = (1.70, 0.02)  # forget and retain distance
FORGOTTEN, WITHIN = 0.005, 1200  # forget distance, steps
LEVELS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # forget distances at which retain is compared
SETTLED = 0.05  # relative growth over the last quarter of the steps


@dataclass(frozen=True)
class Claim:
    """One claim, the numbers that decide it, and whether it holds in them."""

    where: str
    claim: str
    measured: str
    holds: bool


def check(experiment: Experiment, theory: Theory) -> list[Claim]:
    """Decides every claim, on means over the seeds unless the claim says otherwise."""
    gap, no_gap = experiment.gap, experiment.no_gap
    return [
        _start(gap),
        _forgets(gap),
        _forgets_not(gap),
        *(_retain_path(gap, name, settles=False) for name in ("GA", "GA+RT")),
        *(_retain_path(gap, name, settles=True) for name in ("NPO+RT", "DPO+RT")),
        _dominates(gap, "NPO+RT", [n for n in gap.names if n != "NPO+RT"], "best Pareto curve"),
        _dominates(gap, "NPO", ["GA"], "beats GA without retain data"),
        _coincide(no_gap),
        _smallest(no_gap),
        _tends_to_ga(experiment.small_beta),
        *_laws(theory),
        _limit(theory),
    ]


def markdown(claims: Iterable[Claim]) -> str:
    """A table with a row for each claim."""
    rows = (
        (c.where, c.claim, c.measured, "holds" if c.holds else "**does not hold**") for c in claims
    )
    return tables.markdown(rows, ("where", "the paper's claim", "measured", "")) + "\n"


def _start(curves: Curves) -> Claim:
    forget, retain = curves.forget[0, 0], curves.retain[0, 0]
    off = abs(float(forget.mean()) - START[0])
    holds = off <= max(float(forget.std(correction=0)), 0.05)
    holds = holds and abs(float(retain.mean()) - START[1]) <= 0.005
    measured = f"({_with_std(forget)}, {_with_std(retain)})"
    return Claim("alpha 1", f"all start from (forget, retain) = {START}", measured, holds)


def _forgets(curves: Curves) -> Claim:
    last = sum(step <= WITHIN for step in curves.steps)
    measured, holds = [], True
    for name in [name for name in curves.names if name != "IDK+RT"]:
        forget = curves.of(name)[0][:last]
        best = float(forget.mean(1).min())
        seeds = int((forget.amin(0) < FORGOTTEN).sum())
        holds = holds and best < FORGOTTEN
        measured.append(f"{name} {best:.4f} ({seeds} of {forget.shape[1]} seeds)")
    claim = f"all but IDK+RT: forget distance below {FORGOTTEN} within {WITHIN} steps"
    return Claim("alpha 1", claim, f"smallest mean (seeds below): {', '.join(measured)}", holds)


def _forgets_not(curves: Curves) -> Claim:
    best = float(curves.of("IDK+RT")[0].mean(1).min())
    measured = f"smallest mean {best:.3f}"
    return Claim("alpha 1", "IDK+RT does not get there", measured, best >= FORGOTTEN)


def _retain_path(curves: Curves, name: str, settles: bool) -> Claim:
    """The retain distance diverges, or it rises slowly and settles below GA+RT's."""
    retain = curves.of(name)[1].mean(1)
    start, end = float(retain[0]), float(retain[-1])
    growth = float(retain[-1] / retain[len(retain) * 3 // 4]) - 1
    if settles:
        claim = f"{name}: retain distance rises slowly and settles"
        holds = growth <= SETTLED and end < float(curves.of("GA+RT")[1].mean(1)[-1])
    else:
        claim = f"{name}: retain distance diverges"
        holds = growth > SETTLED and end > 5 * start
    measured = (
        f"{start:.3f} at the start, at most {float(retain.max()):.3f}, {end:.3f} at the end; "
        f"{growth:+.0%} in the last quarter"
    )
    return Claim("alpha 1", claim, measured, holds)


def _dominates(curves: Curves, best: str, others: Sequence[str], claim: str) -> Claim:
    """At every level of forgetting that ``best`` reaches, no other keeps more."""
    measured, holds = [], True
    for level in LEVELS:
        distance = _retain_at(curves, best, level)
        rival, name = min((_retain_at(curves, name, level), name) for name in others)
        if distance < math.inf:
            holds = holds and distance <= rival
            nearest = f"{name} {rival:.4f}" if rival < math.inf else "no other gets there"
            measured.append(f"{level:g}: {distance:.4f}, {nearest}")
    text = "least retain distance at a forget distance of at most " + "; ".join(measured)
    return Claim("alpha 1", f"{best}: {claim}", text, holds and bool(measured))


def _retain_at(curves: Curves, name: str, level: float) -> float:
    """Least retain distance where the forget distance is at most ``level``; inf where it never is.

    Between two measured steps the path is straight on logarithmic axes.
    """
    forget, retain = (x.mean(1).log() for x in curves.of(name))
    target, reached = math.log(level), forget <= math.log(level)
    if not reached.any():
        return math.inf
    crossing = (reached[1:] != reached[:-1]).nonzero().flatten()
    before, after = forget[crossing], forget[crossing + 1]
    share = (target - before) / (after - before)
    between = retain[crossing].lerp(retain[crossing + 1], share)
    return float(torch.cat([retain[reached], between]).min().exp())


def _coincide(curves: Curves) -> Claim:
    forget, retain = curves.forget.mean(2), curves.retain.mean(2)
    worst = float(((forget - retain).abs() / forget.maximum(retain)).max())
    measured = f"they differ by at most {worst:.1%} (any method, any step)"
    return Claim("alpha 0", "forget and retain distance coincide", measured, worst <= 0.1)


def _smallest(curves: Curves) -> Claim:
    ends = {name: float(curves.of(name)[0].mean(1)[-1]) for name in curves.names}
    least = {name: float(curves.of(name)[0].mean(1).min()) for name in curves.names}
    holds = all(min(values, key=values.__getitem__) == "NPO+RT" for values in (ends, least))
    cells = (f"{name} {least[name]:.4f} / {ends[name]:.4f}" for name in curves.names)
    measured = f"least / at the end: {', '.join(cells)}"
    return Claim("alpha 0", "NPO+RT has the smallest distance", measured, holds)


def _tends_to_ga(curves: Curves) -> Claim:
    """Compares NPO's curves with GA's, for small beta."""
    measured, holds = [], True
    for steps in (2000, 10000):
        gaps = [_distance_to_ga(curves, f"NPO, beta {beta:g}", steps) for beta in BETAS]
        holds = holds and gaps == sorted(gaps)
        cells = (f"beta {b:g}: {gap:.0%}" for b, gap in zip(BETAS, gaps, strict=True))
        measured.append(f"in {steps} steps {', '.join(cells)}")
    text = f"largest difference, of GA's largest distance: {'; '.join(measured)}"
    return Claim("alpha 1", "NPO's curves tend to GA's as beta -> 0", text, holds)


def _distance_to_ga(curves: Curves, name: str, steps: int) -> float:
    """Largest difference to GA's mean distance in so many steps, relative to GA's largest."""
    last = sum(step <= steps for step in curves.steps)
    npo, ga = (torch.stack(curves.of(n))[:, :last].mean(2) for n in (name, "GA"))
    return float(((npo - ga).abs().amax(1) / ga.amax(1)).max())


def _laws(theory: Theory) -> Iterator[Claim]:
    for loss, law in (("GA", "n_f^(-1/2) eta t"), ("NPO", "sqrt(n_f) log(C eta t / n_f + 1)")):
        fits = [fit for fit in theory.laws if fit.loss == loss]
        exponents = [x for x in theory.exponents if x.loss == loss]
        worst = min(fit.r2 for fit in fits)
        holds = worst > 0.98 and all(abs(x.value - x.theorem) <= 0.1 for x in exponents)
        fitted = ", ".join(f"{x.axis}^{x.value:.2f} ({x.theorem:g})" for x in exponents)
        # D(T) / D(T / 2): 2 where the growth is linear
        doubling = sorted(fit.mean[-1] / fit.mean[len(fit.mean) // 2] for fit in fits)
        measured = (
            f"R^2 at least {worst:.4f}; coefficient ~ {fitted}; "
            f"D(T) / D(T/2) from {doubling[0]:.2f} to {doubling[-1]:.2f}"
        )
        yield Claim("theorem", f"{loss} diverges as {law}", measured, holds)


def _limit(theory: Theory) -> Claim:
    last = theory.limits[-1]
    measured = (
        f"difference ~ beta^{theory.limit_order:.3f}; at beta {last.beta:g}: loss "
        f"{last.loss_difference:.1e}, gradients {last.gradient_difference:.1e} (relative)"
    )
    claim = "NPO - (2/beta) log 2 -> GA - E log p_ref as beta -> 0, gradients too"
    holds = abs(theory.limit_order - 1) < 0.05 and last.gradient_difference < 2 * last.beta
    return Claim("limit", claim, measured, holds)


def _with_std(values: Tensor) -> str:
    return f"{float(values.mean()):.3f} ± {float(values.std(correction=0)):.3f}"
