"""Curves over the steps of runs: their evaluations, and what every step recorded."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from npo_fast.metrics.evidence import MEANINGFUL
from npo_fast.metrics.measures import REPORTED, score
from npo_fast.reports import svg
from npo_fast.reports.runs import RunRecord

DEFAULT_BETA = 0.1  # of NPO, where a run names none


def evaluation_curves(runs: Sequence[RunRecord]) -> Iterator[svg.Figure]:
    """A figure for each measure of the evaluations while training."""
    for measure in REPORTED:
        is_p = measure.key == "forget_quality"
        least, line = (svg.SMALLEST, MEANINGFUL) if is_p else (-math.inf, None)
        unit = f"KS p-value, {measure.better}" if is_p else measure.better
        series = _series(
            runs, lambda _, record, key=measure.key: score(record, key), "evaluations", least
        )
        if series:
            key = f"look-{measure.key.replace('.', '-')}"
            yield svg.curves(key, measure.label, unit, series, is_p, line)


def step_curves(runs: Sequence[RunRecord]) -> Iterator[svg.Figure]:
    """Figures of the losses, log-probabilities and gradients of the steps."""
    yield from _by_name(runs, "log_probs", "log-probability of {} sequences", "nats")
    yield from _by_name(runs, "terms", "{} loss", "before its coefficient")
    if norms := _series(runs, lambda _, step: step["grad_norm"]):
        yield svg.curves("grad-norm", "Gradient norm", "before clipping", norms, True)
    if weights := _series(runs, npo_weight):
        yield svg.curves("grad-weight", "Gradient weight of NPO", "at most", weights)


def npo_weight(run: RunRecord, step: Mapping[str, Any]) -> float | None:
    """Bound on the mean gradient weight ``2 p^b / (p^b + p_ref^b)`` of a step.

    A sequence's weight is ``2 (1 - exp(-b L / 2))`` of its NPO loss L: concave, so the mean loss,
    which alone is recorded, bounds the mean weight from above. None where the step has no NPO.
    """
    loss = step["terms"].get("NPO")
    if loss is None:
        return None
    beta = run.number("method", "beta")
    return 2 * -math.expm1(-(DEFAULT_BETA if beta is None else beta) * loss / 2)


def _by_name(runs: Sequence[RunRecord], key: str, title: str, unit: str) -> Iterator[svg.Figure]:
    """A figure for each name under ``key`` in the step records."""
    names = dict.fromkeys(name for run in runs for step in run.steps for name in step[key])
    for i, name in enumerate(names):
        series = _series(runs, lambda _, step, name=name: step[key].get(name))
        yield svg.curves(f"{key}-{i}", title.format(name), unit, series)


def _series(
    runs: Sequence[RunRecord],
    value: Callable[..., float | None],
    records: str = "steps",
    least: float = -math.inf,
) -> svg.Series:
    """``value(run, record)``, at least ``least``, over the steps of each run that has it."""
    series = {}
    for i, run in enumerate(runs):
        points = [
            (record["step"], max(y, least))
            for record in getattr(run, records)
            if (y := value(run, record)) is not None
        ]
        if points:
            series[run.name] = (i, [x for x, _ in points], [y for _, y in points])
    return series
