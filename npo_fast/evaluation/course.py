"""Measures in the course of an unlearning run: one record a look, and which look was the best."""

import difflib
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from npo_fast import metrics
from npo_fast.errors import UserError

_KNOWLEDGE = ("probability", "rouge_l_recall", "exact_memorization", "extraction_strength")
_OF_A_SET = (*_KNOWLEDGE, "truth_ratio")
_PRINTED = {"rouge_l_recall": "ROUGE-L"}  # where ``metrics.summary`` spells it in its own way
MEASURES = {  # name -> +1 where more of it is better, -1 where less is
    "forget_quality": 1,
    "model_utility": 1,
    **{f"forget.{name}": -1 for name in _KNOWLEDGE},
    "forget.truth_ratio": 1,
    **{f"retain.{name}": 1 for name in _OF_A_SET},
}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """``measure > bound``, or with >=, < or <=."""

    measure: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        match = re.fullmatch(r"\s*([\w.]+)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        try:
            measure, sign, bound = match.groups() if match else ("", "", "")
            number = float(bound)
        except ValueError:
            raise UserError(
                f"cannot read the condition {text!r}: write it as 'forget_quality>0.05'"
            ) from None
        return cls(check_measure(measure), sign, number)

    def holds(self, look: Mapping[str, Any]) -> bool:
        return _COMPARE[self.sign](value_of(look, self.measure), self.bound)


def measures(result: metrics.Result, retrained: metrics.Result | None = None) -> dict[str, Any]:
    """What ``MEASURES`` names, as far as the result allows.

    The truth ratio is TOFU's: mean ``min(ratio, 1 / ratio)`` on the forget set, and
    ``max(0, 1 - ratio)``, which falls where knowledge is lost, on the retain set.
    """
    numbers = metrics.summary(result, retrained)
    spelled = {"forget quality": "forget_quality", "model utility": "model_utility"}
    found: dict[str, Any] = {key: numbers[name] for name, key in spelled.items() if name in numbers}
    for part in ("forget", "retain"):
        keys = {f"{part} {_PRINTED.get(key, key.replace('_', ' '))}": key for key in _OF_A_SET}
        own = {key: numbers[name] for name, key in keys.items() if name in numbers}
        if own:
            found[part] = own
    return found


def value_of(look: Mapping[str, Any], measure: str) -> float:
    """
    Raises:
        UserError: the look has no such measure; the message says what it takes.
    """
    value: Any = look
    for key in measure.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None:
        raise UserError(
            f"{measure} cannot be measured here: forget_quality takes --retrained and a forget set "
            "with wrong answers, model_utility a retain set, real authors and world facts with "
            "wrong answers, retain measures take --retain"
        )
    return float(value)


def check_measure(measure: str) -> str:
    if measure not in MEASURES:
        near = difflib.get_close_matches(measure, MEASURES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown measure {measure!r}{hint} Known: {', '.join(MEASURES)}")
    return measure
