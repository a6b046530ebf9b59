"""Which records make up an evaluation: TOFU's four data sets, or what the user has of them."""

from collections.abc import Mapping
from pathlib import Path

from npo_fast.data import Record, load_records
from npo_fast.errors import UserError
from npo_fast.metrics import FORGET, HOLDOUT, REAL_AUTHORS, RETAIN, WORLD_FACTS

Suite = Mapping[str, list[Record]]  # log file name -> records


def tofu_suite(
    data: str | None,
    forget: str | None,
    retain: str | None,
    holdout: str | None = None,
    *,
    utility: bool = True,
) -> dict[str, list[Record]]:
    """Records by the name of the log they fill.

    ``forget`` and ``retain`` are splits or files as in training. Where a split ``<name>_perturbed``
    lies beside it (TOFU has them), that one is taken, since it carries the paraphrased and wrong
    answers that the truth ratio needs. With ``utility``, TOFU's real authors and world facts join
    where the data has them. Of ``holdout`` only the right answers are of interest.
    """
    suite: dict[str, list[Record]] = {}
    if retain is not None:
        suite[RETAIN] = _with_wrong_answers(data, retain)
    if utility and data is not None:
        for log, name in ((REAL_AUTHORS, "real_authors"), (WORLD_FACTS, "world_facts")):
            try:
                suite[log] = _with_wrong_answers(data, name)
            except UserError:
                continue  # a data set of the user's own has no such split
    if forget is not None:
        suite[FORGET] = _with_wrong_answers(data, forget)
    if holdout is not None:
        suite[HOLDOUT] = [Record(r.messages, r.answer) for r in load_records(holdout, data)]
    return suite


def _with_wrong_answers(data: str | None, name: str) -> list[Record]:
    base, bracket, part = name.partition("[")
    try:
        return load_records(f"{_perturbed(base)}{bracket}{part}", data)
    except UserError:
        return load_records(name, data)


def _perturbed(name: str) -> str:
    path = Path(name)
    return f"{path.with_suffix('')}_perturbed{path.suffix}" if path.suffix else f"{name}_perturbed"
