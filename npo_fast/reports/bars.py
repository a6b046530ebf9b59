"""Probability and ROUGE-L before and after, as bars: the first chart of a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from npo_fast.metrics.measures import score
from npo_fast.reports.measured import Comparison, some_names
from npo_fast.reports.svg import color_of

Kind = Literal["before", "after", "retrained"]
_MEASURES = {  # what the bars show, by set and key; all are between 0 and 1
    "forget": {
        "forget.probability": "Probability of the right answer",
        "forget.rouge_l_recall": "ROUGE-L of the model's answer",
        "verbmem_forget": "Verbatim memorization (VerbMem)",
        "knowmem_forget": "Knowledge of the forgotten texts (KnowMem)",
    },
    "retain": {
        "retain.probability": "Probability of the right answer",
        "retain.rouge_l_recall": "ROUGE-L of the model's answer",
        "knowmem_retain": "Knowledge of the kept texts (KnowMem)",
    },
}
_KEYS = [key for keys in _MEASURES.values() for key in keys]


class Bar(NamedTuple):
    """One bar with its label."""

    name: str
    value: float
    kind: Kind
    color: str = ""


class Chart(NamedTuple):
    """One measure of one set."""

    part: str  # "forget" or "retain"
    label: str
    bars: list[Bar]


@dataclass(frozen=True)
class _Group:
    """Runs that began at the same measures."""

    before: Mapping[str, float]
    after: dict[str, tuple[int, Mapping[str, float]]]  # run -> its index, its measures


def charts(
    runs: Sequence[str], comparisons: Mapping[str, Comparison], retrained: Mapping[str, Any]
) -> list[Chart]:
    """The charts of all measures that some run has.

    Args:
        runs: all of the page, in order.
        comparisons: of the runs that have one.
        retrained: nested measures on the same records.
    """
    groups: list[_Group] = []
    for index, name in enumerate(runs):
        if name in comparisons:
            before, after = (_flat(s) for s in (comparisons[name].before, comparisons[name].after))
            same = (group for group in groups if group.before == before)
            if (group := next(same, None)) is None:
                groups.append(group := _Group(before, {}))
            group.after[name] = index, after
    drawn = [
        Chart(part, label, _bars(key, groups, len(runs), _flat(retrained)))
        for part, labels in _MEASURES.items()
        for key, label in labels.items()
    ]
    return [chart for chart in drawn if any(bar.kind != "retrained" for bar in chart.bars)]


def _bars(
    key: str, groups: Sequence[_Group], runs: int, retrained: Mapping[str, float]
) -> list[Bar]:
    bars = []
    for group in groups:
        if key in group.before:
            names = "" if len(groups) == 1 else f" {some_names(list(group.after))}"
            bars.append(Bar(f"before{names}", group.before[key], "before"))
        for name, (index, scores) in group.after.items():
            if key in scores:
                label = "after" if runs == 1 and group.before else name
                bars.append(Bar(label, scores[key], "after", color_of(index)))
    if key in retrained:
        bars.append(Bar("retrained", retrained[key], "retrained"))
    return bars


def _flat(scores: Mapping[str, Any]) -> dict[str, float]:
    found = {key: score(scores, key) for key in _KEYS}
    return {key: value for key, value in found.items() if value is not None}
