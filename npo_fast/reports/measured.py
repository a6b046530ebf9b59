"""What a report shows of evaluation logs, whether of TOFU's evaluation or of MUSE's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npo_fast.errors import UserError
from npo_fast.metrics import FORGET, MEASURES, RETAIN, Result, examples_in, muse
from npo_fast.metrics.intervals import intervals
from npo_fast.metrics.logs import CONVENTIONS
from npo_fast.metrics.measures import REPORTED, measures

COLUMNS = (*REPORTED, *(each for each in muse.MEASURES.values() if each.key != "privleak_auc"))
"""The measures of a report's table, in order."""
_LOGS = {  # of answers, by set; MUSE has two of the forget set
    "forget": (FORGET, muse.KNOWMEM_FORGET, muse.VERBMEM),
    "retain": (RETAIN, muse.KNOWMEM_RETAIN),
}
_NAMED = 3  # runs that a sentence names


@dataclass(frozen=True)
class Comparison:
    """Nested measures of the same records before and after a run; {} where there are none."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    records: str  # which ones, in words
    logged: bool = False  # by an evaluation of its own, not by the run


def measures_of(result: Result, retrained: Result) -> dict[str, Any]:
    """Every measure that the logs allow, by key; TOFU's are nested.

    Raises:
        UserError: the retrained model's logs are of other records, or of the other evaluation.
    """
    if result and retrained and muse.is_muse(result) != muse.is_muse(retrained):
        raise UserError("its logs and those of --retrained are of different suites (TOFU, MUSE)")
    if not muse.is_muse(result):
        return measures(result, retrained)
    if retrained:
        sizes = {name: examples_in(log) for name, log in result.items()}
        share = result[muse.PRIVLEAK_FORGET].get(CONVENTIONS, {}).get("min_k_share")
        muse.check_retrained(retrained, sizes, share or muse.MIN_K_SHARE)
    return {**muse.measures(result, retrained)}


def intervals_of(result: Result) -> dict[str, tuple[float, float]]:
    """The bootstrap intervals of a report's measures, by key."""
    registry = muse.MEASURES if muse.is_muse(result) else MEASURES
    return intervals(result, tuple(each.key for each in COLUMNS if each.key in registry), registry)


def answer_logs(result: Result, part: str) -> list[Mapping[str, Any]]:
    """The logs with answers to the ``forget`` or ``retain`` set."""
    return [result[name] for name in _LOGS[part] if name in result]


def records_in(result: Result) -> str:
    """How many forget records logs are of, in words; empty where they have none."""
    count = sum(map(examples_in, answer_logs(result, "forget")))
    return f"{count} forget records" if count else ""


def some_names(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
