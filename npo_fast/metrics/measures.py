"""Every measure, once: its names, which way is better, what it needs and how to compute it.

``summary``, the scores of evaluations.jsonl (``measures``), ``--keep-best``, ``--stop-when`` and
the report's columns and curves derive from the registry ``MEASURES``.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npo_fast.errors import UserError
from npo_fast.metrics.logs import (
    FORGET,
    HOLDOUT,
    REPHRASED,
    RETAIN,
    TRUTH_RATIO_COLUMNS,
    UTILITY_SETS,
    VOCABULARY,
    Log,
    Result,
    column,
    examples_in,
    values_of,
)
from npo_fast.metrics.memorization import (
    ATTACKS,
    attack_auc,
    conventions_of,
    counted_alike,
    privleak,
    rel_diff,
)
from npo_fast.metrics.tofu import (
    forget_quality,
    forget_truth_ratio,
    knowledge_ratio,
    model_utility,
    probability,
    right_share,
    smallest_forget_quality,
    utility_terms,
)

_SOURCES = {  # what fills a log or a column, in words
    FORGET: "a forget set",
    RETAIN: "a retain set",
    HOLDOUT: "--holdout",
    **{file: name for name, file in UTILITY_SETS.items() if file != RETAIN},
    **dict.fromkeys(TRUTH_RATIO_COLUMNS, "wrong answers"),
    **dict.fromkeys(("rougeL_recall", "rougeL_f1", "repetition"), "generated answers"),
}
_ALWAYS = ("avg_gt_loss", VOCABULARY)  # columns that every evaluation of npo_fast has
_BY_CONVENTION = (
    "exact_memorization",
    "extraction_strength",
    "gradient_norm",
)  # as min-k is, see ``Conventions``


@dataclass(frozen=True)
class Measure:
    """One number of a result, and all that is known about it."""

    key: str
    """``name`` or ``set.name``: its place in evaluations.jsonl, its name for --keep-best."""
    label: str
    """What tables and figures print."""
    compute: Callable[[Result, Result], float]
    """Takes a result and the result of the retrained model."""
    needs: Mapping[str, tuple[str, ...]]
    """The logs it is computed from, each with the columns it needs."""
    needs_retrained: bool = False
    """Whether it needs the same columns of the retrained model's logs."""
    direction: int = 0
    """+1: higher is better, -1: lower is better, 0: ``summary`` has it, evaluations.jsonl not."""
    in_report: bool = False
    """Whether the report has a column and a curve for it."""

    def available(self, result: Result, retrained: Result | None) -> bool:
        """Whether the logs hold what the measure needs."""
        compared = [retrained or {}] if self.needs_retrained else []
        return all(
            file in logs and all(name in logs[file] for name in columns)
            for logs in (result, *compared)
            for file, columns in self.needs.items()
        )

    def label_of(self, result: Result) -> str:
        """The label, with the conventions of these logs where they matter and are not the usual."""
        file, columns = next(iter(self.needs.items()))
        min_k = any(name.startswith("min_k") for name in columns)
        counted = min_k or any(name in _BY_CONVENTION for name in columns)
        conventions = conventions_of(result[file], min_k) if counted else ""
        return f"{self.label} ({conventions})" if conventions else self.label

    @property
    def better(self) -> str:
        """The direction in words: "higher is better", "lower is forgotten", "higher is kept"."""
        outcome = {"forget": "forgotten", "retain": "kept"}.get(self.key.split(".")[0], "better")
        return f"{'higher' if self.direction > 0 else 'lower'} is {outcome}"

    @property
    def requirement(self) -> str:
        """What the user has to give to get the measure, in words."""
        sources = ["--retrained"] * self.needs_retrained + [_SOURCES[file] for file in self.needs]
        columns = (name for names in self.needs.values() for name in names if name not in _ALWAYS)
        names = [_SOURCES.get(name, name) for name in columns]
        with_columns = f" with {' and '.join(dict.fromkeys(names))}" if names else ""
        return ", ".join([*sources[:-2], " and ".join(sources[-2:])]) + with_columns


def kl_to_reference(log: Log) -> float:
    """Returns the mean over all answer tokens of ``KL(reference || model)``, in nats."""
    return float(np.average(column(log, "kl_to_reference"), weights=column(log, "num_token_gt")))


def without_end(log: Log) -> float:
    """Returns the share of generated answers that ran on or were cut at the longest length.

    Texts, which end nowhere, are not counted.
    """
    return float(np.mean([ending != "stop" for ending in values_of(log, "ending") if ending]))


def at_the_limit(log: Log) -> float:
    """Returns the share of generated answers that ``max_new_tokens`` cut."""
    return float(np.mean([ending == "limit" for ending in values_of(log, "ending") if ending]))


def below_chance(log: Log) -> float:
    """Returns the share of answers that are less likely than random tokens.

    Their mean loss a token is above ``ln V``, that of a token drawn evenly from the vocabulary.
    """
    return float(np.mean(column(log, "avg_gt_loss") > math.log(log[VOCABULARY])))


def answer_perplexity(log: Log) -> float:
    """Returns ``exp(loss / tokens)`` over all tokens of generated answers, under the reference."""
    losses, tokens = column(log, "generated_loss"), column(log, "num_token_generated")
    return float(np.exp(losses.sum() / max(1, tokens.sum())))


def _of_log(
    part: str,  # "forget" or "retain"
    name: str,
    label: str,
    *needs: str,  # columns
    formula: Callable[[Log], float] | None = None,
    direction: int | None = None,
    in_report: bool = False,
) -> Measure:
    """A measure of one log, by default a column's mean: less is forgotten, more is kept."""
    file, usual = {"forget": (FORGET, -1), "retain": (RETAIN, 1)}[part]
    formula = formula or (lambda log: float(column(log, needs[0]).mean()))
    return Measure(
        f"{part}.{name}", f"{part} {label}", lambda result, _: formula(result[file]),
        {file: needs}, direction=usual if direction is None else direction, in_report=in_report,
    )  # fmt: skip


def _tofu(part: str) -> tuple[Measure, ...]:
    return (
        _of_log(part, "probability", "probability", "avg_gt_loss", in_report=True,
                formula=lambda log: float(probability(log).mean())),
        _of_log(part, "rouge_l_recall", "ROUGE-L", "rougeL_recall", in_report=True),
        _of_log(part, "rouge_l_f1", "ROUGE-L F1", "rougeL_f1"),
    )  # fmt: skip


def _probability_rephrased(log: Log) -> float:
    return float(np.exp(-column(log, f"avg_gt_loss{REPHRASED}")).mean())


def _beyond_tofu(part: str) -> tuple[Measure, ...]:
    return (
        _of_log(part, "exact_memorization", "exact memorization", "exact_memorization"),
        _of_log(part, "extraction_strength", "extraction strength", "extraction_strength"),
        _of_log(part, "kl_to_reference", "KL to reference", "kl_to_reference", "num_token_gt",
                formula=kl_to_reference, direction=0),
        _of_log(part, "without_end", "answers without an end", "ending", formula=without_end,
                direction=0),
        _of_log(part, "at_the_limit", "answers at the length limit", "ending",
                formula=at_the_limit, direction=0),
        _of_log(part, "repetition", "repetition in answers", "repetition", direction=-1),
        _of_log(part, "below_chance", "answers less likely than random tokens", "avg_gt_loss",
                VOCABULARY, formula=below_chance, direction=-1),
        _of_log(part, "truth_ratio_prob_mean", "truth ratio, right / (right + wrong)",
                *TRUTH_RATIO_COLUMNS, formula=lambda log: float(right_share(log).mean())),
        *(_of_log(part, f"{name}{REPHRASED}", f"{label}, paraphrased question",
                  f"{needed}{REPHRASED}", direction=0, formula=formula)
          for name, label, needed, formula in (
              ("probability", "probability", "avg_gt_loss", _probability_rephrased),
              ("rouge_l_recall", "ROUGE-L", "rougeL_recall", None),
              ("rouge_l_f1", "ROUGE-L F1", "rougeL_f1", None))),
        _of_log(part, "answer_perplexity", "perplexity of answers under the reference",
                "generated_loss", "num_token_generated", formula=answer_perplexity, direction=0),
    )  # fmt: skip


def _utility_term(term: str) -> Measure:
    return Measure(f"utility.{term}", term, lambda result, _: utility_terms(result)[term], _UTILITY)


def _membership_auc(attack: str) -> Measure:
    return Measure(
        f"membership_auc.{attack}", f"membership AUC, {attack}",
        lambda result, _: attack_auc(result, attack),
        dict.fromkeys((FORGET, HOLDOUT), ATTACKS[attack][0]),
    )  # fmt: skip


@dataclass(frozen=True)
class _AgainstRetrained(Measure):
    """A membership AUC of min-k beside that of the retrained model."""

    undefined: float = math.nan
    """The AUC of the retrained model that leaves nothing to divide by."""

    def available(self, result: Result, retrained: Result | None) -> bool:
        if not super().available(result, retrained) or not counted_alike(result, retrained or {}):
            return False
        return attack_auc(retrained or {}, "min-k") != self.undefined


def _against_retrained(
    key: str, label: str, formula: Callable[[float, float], float], undefined: float
) -> Measure:
    return _AgainstRetrained(
        key, f"{label}, min-k",
        lambda *results: formula(*(attack_auc(each, "min-k") for each in results)),
        _MIN_K, needs_retrained=True, undefined=undefined,
    )  # fmt: skip


_MIN_K = dict.fromkeys((FORGET, HOLDOUT), ("min_k",))
_UTILITY = dict.fromkeys(
    UTILITY_SETS.values(), ("avg_gt_loss", *TRUTH_RATIO_COLUMNS, "rougeL_recall")
)
MEASURES = {  # by key, in the order of ``summary``
    measure.key: measure
    for measure in (
        Measure("model_utility", "model utility", lambda result, _: model_utility(result),
                _UTILITY, direction=1, in_report=True),
        Measure("model_utility_arithmetic", "model utility, arithmetic truth ratio",
                lambda result, _: model_utility(result, arithmetic=True), _UTILITY),
        *_tofu("retain"),
        Measure("retain.truth_ratio", "retain truth ratio",
                lambda result, _: knowledge_ratio(result[RETAIN]),
                {RETAIN: TRUTH_RATIO_COLUMNS}, direction=1),
        *(_utility_term(f"{part} {label}") for part in ("real authors", "world facts")
          for label in ("probability", "ROUGE-L", "truth ratio")),
        *_tofu("forget"),
        Measure("forget.truth_ratio", "forget truth ratio",
                lambda result, _: forget_truth_ratio(result),
                {FORGET: TRUTH_RATIO_COLUMNS}, direction=1),
        Measure("forget_quality", "forget quality", forget_quality,
                {FORGET: TRUTH_RATIO_COLUMNS}, needs_retrained=True, direction=1, in_report=True),
        Measure("smallest_forget_quality", "smallest forget quality of as many records",
                lambda result, _: smallest_forget_quality(examples_in(result[FORGET])),
                {FORGET: TRUTH_RATIO_COLUMNS}, needs_retrained=True, direction=-1),
        *_beyond_tofu("forget"),
        *_beyond_tofu("retain"),
        *(_membership_auc(attack) for attack in ATTACKS),
        _against_retrained("privleak", "privacy leakage, %", privleak, 1.0),
        _against_retrained("rel_diff", "membership AUC against retrained, %", rel_diff, 0.0),
    )
}  # fmt: skip
RECORDED = {  # those of evaluations.jsonl, by key: the whole model's, then the sets'
    measure.key: measure
    for measure in sorted(MEASURES.values(), key=lambda m: ("." in m.key, m.key.partition(".")[0]))
    if measure.direction
}
REPORTED = [measure for measure in RECORDED.values() if measure.in_report]


def summary(result: Result, retrained: Result | None = None) -> dict[str, float]:
    """Returns every measure that the logs allow, by ``Measure.label_of`` the logs."""
    return {
        measure.label_of(result): measure.compute(result, retrained or {})
        for measure in MEASURES.values()
        if measure.available(result, retrained)
    }


def measures(result: Result, retrained: Result | None = None) -> dict[str, Any]:
    """Returns the ``RECORDED`` measures that the logs allow, as evaluations.jsonl has them.

    The key ``forget.probability`` becomes ``{"forget": {"probability": …}}``.
    """
    scores: dict[str, Any] = {}
    for measure in RECORDED.values():
        if measure.available(result, retrained):
            part, _, name = measure.key.rpartition(".")
            scores_of_part = scores.setdefault(part, {}) if part else scores
            scores_of_part[name] = measure.compute(result, retrained or {})
    return scores


def score(scores: Mapping[str, Any], key: str) -> float | None:
    """Returns one of the nested ``measures``, or None where it is not there."""
    value: Any = scores
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def value_of(scores: Mapping[str, Any], key: str) -> float:
    """Returns one of the nested ``measures``, or raises a ``UserError`` that says what it needs."""
    value = score(scores, key)
    if value is None:
        raise UserError(
            f"{key} cannot be measured here: {key} takes {find_measure(key).requirement}"
        )
    return value


def find_measure(key: str) -> Measure:
    """Returns the recorded measure with this key, or raises a ``UserError`` with the nearest."""
    if key not in RECORDED:
        near = difflib.get_close_matches(key, RECORDED, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown measure {key!r}{hint} Known: {', '.join(RECORDED)}")
    return RECORDED[key]


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """A bound on a measure: ``measure > bound``, or with >=, < or <=."""

    measure: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Reads a condition such as "forget_quality>0.05"; others raise a ``UserError``."""
        match = re.fullmatch(r"\s*([\w.]+)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        try:
            measure, sign, bound = match.groups() if match else ("", "", "")
            number = float(bound)
        except ValueError:
            raise UserError(
                f"cannot read the condition {text!r}: write it as 'forget_quality>0.05'"
            ) from None
        return cls(find_measure(measure).key, sign, number)

    def holds(self, scores: Mapping[str, Any]) -> bool:
        """Whether the nested ``measures`` meet it; a ``UserError`` where it is missing."""
        return _COMPARE[self.sign](value_of(scores, self.measure), self.bound)
