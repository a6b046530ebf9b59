"""Evaluation logs in open-unlearning's form: ``TOFU_EVAL.json``, read and written.

A file maps the name of a metric to its mean, ``agg_value``, and its values by example,
``value_by_index``, whose keys are rows of the data set. ``TOFU_SUMMARY.json`` has the means alone.
Of a set (``forget``, ``retain``, ``ra``, ``wf``):

    <set>_Q_A_Prob         prob, avg_loss                     avg_gt_loss
    <set>_Q_A_PARA_Prob    prob, avg_loss                     avg_paraphrased_loss
    <set>_Q_A_PERT_Prob    the same, a list an example        average_perturb_loss
    <set>_Q_A_ROUGE        rouge1_recall, rougeL_recall, …    ROUGE and answers
    exact_memorization, extraction_strength    score          columns of the forget set
    mia_<attack>           forget and holdout, each score     the holdout set, and zlib_bytes

Losses are read, and measures computed from them. What differs:

- Their truth ratios and normalised probabilities add 1e-10 to the denominator. It shows where a
  model has collapsed, and so in their forget quality. Written logs have it, as their code expects.
- Exact memorization, extraction strength and min-k follow their conventions
  (``npo_fast.metrics.memorization.Conventions``); the k of min-k is not in the file. Columns that
  follow others are not written.
- Their last token is whatever ends the label: a chat template may write ``<|im_end|>\\n`` and their
  code an end-of-sequence token after it. Their zlib compresses the decoded label.
- There are no numbers of tokens, no KL, no paraphrased questions beside the others, and no exact
  memorization of the retain set.

Source: github.com/locuslab/open-unlearning, ``src/evals`` and ``configs/eval/tofu_metrics``.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import hmean, ks_2samp

from npo_fast.errors import UserError, named
from npo_fast.metrics.logs import (
    CONVENTIONS,
    ENTRIES,
    FORGET,
    HOLDOUT,
    REAL_AUTHORS,
    RETAIN,
    UTILITY_SETS,
    WORLD_FACTS,
    Log,
    Result,
    check_indices,
    column,
    values_of,
)
from npo_fast.metrics.measures import MEASURES
from npo_fast.metrics.memorization import (
    ATTACKS,
    attack_auc,
    conventions_of,
    membership_scores,
    privleak,
)
from npo_fast.metrics.tofu import wrong_losses
from npo_fast.validation import check_shape

logger = logging.getLogger(__name__)

EVAL, SUMMARY = "TOFU_EVAL.json", "TOFU_SUMMARY.json"
Metrics = Mapping[str, Any]  # name -> agg_value, value_by_index
_EPSILON = 1e-10  # in their denominators
_SETS = {FORGET: "forget", RETAIN: "retain", REAL_AUTHORS: "ra", WORLD_FACTS: "wf"}
_LOSSES = {"Prob": "avg_gt_loss", "PARA_Prob": "avg_paraphrased_loss",
           "PERT_Prob": "average_perturb_loss"}  # fmt: skip
_ROUGE = ("rouge1_recall", "rougeL_f1", "rougeL_recall")
_TEXTS = ("input", "generation", "ground_truth")  # of a row of generated_text
_MEMORIZATION = ("exact_memorization", "extraction_strength")  # of the forget set
_ATTACKS = {  # metric -> attack, and its column
    "mia_loss": ("loss", "avg_gt_loss"),
    "mia_zlib": ("zlib", "zlib_bytes"),
    "mia_min_k": ("min-k", "min_k"),
    "mia_min_k_plus_plus": ("min-k++", "min_k_plus_plus"),
    "mia_reference": ("reference", "avg_reference_loss"),
    "mia_gradnorm": ("gradnorm", "gradient_norm"),
}
_BY_CONVENTION = ("min-k", "min-k++", "gradnorm")
_TRUTH_RATIO = {
    "forget": "forget_truth_ratio", **{p: f"{p}_Truth_Ratio" for p in ("retain", "ra", "wf")}
}  # fmt: skip
_MEASURES = {  # metric -> key of our measure
    "model_utility": "model_utility",
    **{f"{part}_Q_A_Prob": f"{part}.probability" for part in ("forget", "retain")},
    **{f"{part}_Q_A_ROUGE": f"{part}.rouge_l_recall" for part in ("forget", "retain")},
    **{_TRUTH_RATIO[part]: f"{part}.truth_ratio" for part in ("forget", "retain")},
    **{name: f"forget.{name}" for name in _MEMORIZATION},
    **{metric: f"membership_auc.{attack}" for metric, (attack, _) in _ATTACKS.items()},
}
_UTILITY = [
    name
    for part in map(_SETS.get, UTILITY_SETS.values())
    for name in (f"{part}_Q_A_Prob" + "_normalised" * (part != "retain"), f"{part}_Q_A_ROUGE",
                 _TRUTH_RATIO[str(part)])
]  # fmt: skip
_DERIVED = ("model_utility", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised",
            *_TRUTH_RATIO.values())  # fmt: skip


def is_eval(content: Metrics) -> bool:
    """Whether a JSON object has the form of ``TOFU_EVAL.json``."""
    return any(isinstance(each, Mapping) and "agg_value" in each for each in content.values())


def is_summary(content: Metrics) -> bool:
    """Whether a JSON object has the form of ``TOFU_SUMMARY.json``: a number a metric."""
    return bool(content.keys() & _MEASURES.keys()) and not any(
        isinstance(value, Mapping) for value in content.values()
    )


# ---- reading ----


def read(content: Metrics, name: str) -> dict[str, Log]:
    """Returns the logs in the content of a ``TOFU_EVAL.json``.

    Messages name the metrics that no log has a column for, and those whose mean in the file is not
    the one computed from its values.

    Args:
        name: of the file, for messages.

    Raises:
        UserError: a metric lacks its values, or is of other examples than another of its set.
    """
    content = {metric: each for metric, each in content.items() if isinstance(each, Mapping)}
    reader = _Reader(content, name)
    result: dict[str, Log] = {}
    for file, part in _SETS.items():
        columns = reader.set_columns(part)
        if file == FORGET:
            columns |= reader.attack_columns("forget", columns.get("avg_gt_loss"))
        if columns:
            result[file] = reader.log(columns)
    if holdout := reader.attack_columns("holdout", None):
        result[HOLDOUT] = reader.log(holdout)
    if not result:
        raise UserError(
            f"{name} has open-unlearning's form and none of TOFU's metrics with values by example: "
            f"it holds {', '.join(sorted(content))}"
        )
    if unread := sorted(content.keys() - reader.used - {*_DERIVED}):
        logger.info(f"{name}: not read: {', '.join(unread)}")
    _compare(content, result, name)
    return result


class _Reader:
    """Columns of the metrics in a file, and which metrics they came from."""

    def __init__(self, content: Metrics, name: str) -> None:
        self.content, self.name = content, name
        self.used: set[str] = set()

    def values(
        self, metric: str, key: str, split: str | None = None, optional: bool = False
    ) -> dict[int, Any]:
        """A value by example; empty where the file lacks the metric, or some of its values."""
        with named(f"{self.name}: {metric}"):
            entry = self.content.get(metric, {})
            entry = entry.get(split, {}) if split else entry
            check_shape(entry, dict[str, Any], split or "")
            if (rows := entry.get("value_by_index")) is None:  # a mean alone
                return {}
            check_shape(rows, dict[str, dict[str, Any]], "value_by_index")
            check_indices(rows)
            if not all(key in row for row in rows.values()):
                if optional:
                    return {}
                raise UserError(f"no {key!r} by example, so it cannot be read")
            hint = str if key in _TEXTS else float | list[float]
            values = {int(index): row[key] for index, row in rows.items()}
            check_shape([*values.values()], list[hint | None], key)  # type: ignore[valid-type]
        self.used.add(metric)
        if missing := sum(value is None for value in values.values()):
            logger.warning(
                f"{self.name}: {metric} is left out: {missing} of {len(values)} examples have none"
            )
            return {}
        return values

    def set_columns(self, part: str) -> dict[str, dict[int, Any]]:
        """The columns of a set, values by example."""
        right = self.values(f"{part}_Q_A_Prob", "avg_loss")
        paraphrased = self.values(f"{part}_Q_A_PARA_Prob", "avg_loss")
        columns = {
            "avg_gt_loss": right,
            # as in their code, the right answer itself where the set has no paraphrases
            "avg_paraphrased_loss": paraphrased or (right if part in ("ra", "wf") else {}),
            "average_perturb_loss": self.values(f"{part}_Q_A_PERT_Prob", "avg_loss"),
        }
        metric = f"{part}_Q_A_ROUGE"
        for key in _ROUGE:
            columns[key] = self.values(metric, key, optional=key != "rougeL_recall")
        texts = [self.values(metric, key, optional=True) for key in _TEXTS]
        if all(texts):
            columns["generated_text"] = {i: [each[i] for each in texts] for i in texts[0]}
        if part == "forget":
            columns |= {name: self.values(name, "score") for name in _MEMORIZATION}
        return {name: values for name, values in columns.items() if values}

    def attack_columns(
        self, split: str, losses: dict[int, float] | None
    ) -> dict[str, dict[int, Any]]:
        """The columns of the attacks on "forget" or "holdout"; their scores are low for members."""
        scores = {metric: self.values(metric, "score", split) for metric in _ATTACKS}
        loss, over_size = scores["mia_loss"], scores["mia_zlib"]
        columns = {"avg_gt_loss": losses or loss}
        if loss and over_size and all(over_size.values()):
            columns["zlib_bytes"] = {
                i: round(loss[i] / each) for i, each in over_size.items() if i in loss
            }
        elif over_size:
            logger.warning(f"{self.name}: mia_zlib is left out: it takes a mia_loss above 0")
        over_reference = scores["mia_reference"]
        if over_reference and not loss:
            logger.warning(f"{self.name}: mia_reference is left out: it takes a mia_loss")
        columns["avg_reference_loss"] = {
            i: loss[i] - each for i, each in over_reference.items() if i in loss
        }
        columns["gradient_norm"] = scores["mia_gradnorm"]
        for metric in ("mia_min_k", "mia_min_k_plus_plus"):
            columns[_ATTACKS[metric][1]] = {i: -each for i, each in scores[metric].items()}
        return {name: values for name, values in columns.items() if values}

    def log(self, columns: dict[str, dict[int, Any]]) -> Log:
        """The columns as lists, in the order of the rows of the data set."""
        (first, examples), *others = columns.items()
        for other, values in others:
            if values.keys() != examples.keys():
                raise UserError(
                    f"{self.name} holds two evaluations: {other} is of {len(values)} examples, "
                    f"{first} of {len(examples)}, and they are not the same"
                )
        order = sorted(examples)
        log: dict[str, Any] = {name: [each[i] for i in order] for name, each in columns.items()}
        return {**log, CONVENTIONS: {"memorization": "open-unlearning", "min_k_share": None}}


def _compare(content: Metrics, result: Result, name: str) -> None:
    """Says which means of the file are not those of its values by example."""
    for metric, key in _MEASURES.items():
        theirs, measure = content.get(metric, {}).get("agg_value"), MEASURES[key]
        if not isinstance(theirs, (int, float)) or not measure.available(result, None):
            continue
        ours = measure.compute(result, {})
        if not abs(ours - theirs) <= 1e-4:
            logger.warning(
                f"{name}: {metric} is {theirs:.4g} in the file, and {ours:.4g} by our definition "
                f"of {measure.label}, from its values by example"
            )


# ---- writing ----


def metrics_of(result: Result, retrained: Result | None = None) -> dict[str, Any]:
    """Returns the content of a ``TOFU_EVAL.json``; messages name what is not in it.

    Args:
        retrained: logs of the retrained model, for forget quality and ``privleak``.
    """
    metrics: dict[str, Any] = {}
    for file, part in _SETS.items():
        metrics |= _set_metrics(result.get(file, {}), part)
    metrics |= _memorization_metrics(result) | _attack_metrics(result)
    terms = [metrics.get(name, {}).get("agg_value") for name in _UTILITY]
    if None not in terms:
        metrics["model_utility"] = {"agg_value": float(hmean(terms))}
    if retrained is not None:
        metrics |= _comparisons(metrics, retrained)
    _say_what_is_lost(result, metrics)
    return dict(sorted(metrics.items()))


def summary_of(metrics: Metrics) -> dict[str, float]:
    """Returns the content of the ``TOFU_SUMMARY.json`` beside."""
    return {name: metric["agg_value"] for name, metric in metrics.items()}


def _metric(mean: float, **columns: Any) -> dict[str, Any]:
    """A metric with its mean and its values by example."""
    rows = zip(*(np.asarray(values).tolist() for values in columns.values()), strict=True)
    by_index = {str(i): dict(zip(columns, row, strict=True)) for i, row in enumerate(rows)}
    return {"agg_value": float(mean), "value_by_index": by_index}


def _set_metrics(log: Log, part: str) -> dict[str, Any]:
    """Probabilities, truth ratios and ROUGE of a set."""
    metrics: dict[str, Any] = {}
    losses = {name: column(log, name) for name in _LOSSES.values() if name in log}
    if "average_perturb_loss" in losses:
        losses["average_perturb_loss"] = wrong_losses(log)
    right, paraphrased, wrong = (losses.get(name) for name in _LOSSES.values())
    for name, key in _LOSSES.items():
        if key in losses:
            prob = np.exp(-losses[key])
            metrics[f"{part}_Q_A_{name}"] = _metric(prob.mean(), prob=prob, avg_loss=losses[key])
    same = right is not None and paraphrased is not None and np.array_equal(paraphrased, right)
    if same and part in ("ra", "wf"):
        del metrics[f"{part}_Q_A_PARA_Prob"]  # their code takes the answer itself
    if part in ("ra", "wf") and right is not None and wrong is not None:
        prob = np.exp(-right)
        prob = prob / (prob + np.exp(-wrong).sum(axis=1) + _EPSILON)
        metrics[f"{part}_Q_A_Prob_normalised"] = _metric(prob.mean(), prob=prob)
    if paraphrased is not None and wrong is not None:
        ratio = np.exp(-wrong.mean(axis=1)) / (np.exp(-paraphrased) + _EPSILON)
        closer_to_1 = np.minimum(ratio, 1 / (ratio + _EPSILON))
        each = closer_to_1 if part == "forget" else np.maximum(0, 1 - ratio)
        metrics[_TRUTH_RATIO[part]] = _metric(each.mean(), score=ratio)
    if "rougeL_recall" in log:
        columns: dict[str, Any] = {name: column(log, name) for name in _ROUGE if name in log}
        if "generated_text" in log:
            texts = zip(*values_of(log, "generated_text"), strict=True)
            columns |= zip(_TEXTS, map(list, texts), strict=True)
        metrics[f"{part}_Q_A_ROUGE"] = _metric(columns["rougeL_recall"].mean(), **columns)
    return metrics


def _is_theirs(log: Log, attack: str) -> bool:
    """Whether the attack counts as their code does; a log that was read from it does not say k."""
    words = conventions_of(log, min_k=attack.startswith("min-k"))
    return words in ("open-unlearning", "open-unlearning, k not recorded")


def _memorization_metrics(result: Result) -> dict[str, Any]:
    log = result.get(FORGET, {})
    if conventions_of(log, min_k=False) != "open-unlearning":
        return {}
    columns = {name: column(log, name) for name in _MEMORIZATION if name in log}
    return {name: _metric(values.mean(), score=values) for name, values in columns.items()}


def _attack_metrics(result: Result) -> dict[str, Any]:
    """The attacks that tell the forget set from the holdout set; scores are low for members."""
    metrics: dict[str, Any] = {}
    logs = {"forget": result.get(FORGET, {}), "holdout": result.get(HOLDOUT, {})}
    for metric, (attack, _) in _ATTACKS.items():
        complete = all(name in log for name in ATTACKS[attack][0] for log in logs.values())
        counted = attack in _BY_CONVENTION
        if not complete or (counted and not all(_is_theirs(log, attack) for log in logs.values())):
            continue
        scores = {split: -membership_scores(log, attack) for split, log in logs.items()}
        auc = attack_auc(result, attack)
        splits = {split: _metric(values.mean(), score=values) for split, values in scores.items()}
        metrics[metric] = {**splits, "auc": auc, "agg_value": auc}
    return metrics


def _comparisons(metrics: Metrics, retrained: Result) -> dict[str, Any]:
    """Forget quality and ``privleak``, as far as both models have what they compare."""
    theirs = _set_metrics(retrained.get(FORGET, {}), "forget") | _attack_metrics(retrained)
    compared: dict[str, Any] = {}
    ratio, attack = _TRUTH_RATIO["forget"], "mia_min_k"
    if ratio in metrics and ratio in theirs:
        rows, others = (each[ratio]["value_by_index"].values() for each in (metrics, theirs))
        if len(rows) == len(others):
            scores = ([row["score"] for row in each] for each in (rows, others))
            compared["forget_quality"] = {"agg_value": float(ks_2samp(*scores).pvalue)}
    if attack in metrics and attack in theirs:
        leak = privleak(metrics[attack]["auc"], theirs[attack]["auc"])
        compared["privleak"] = {"agg_value": leak}
    return compared


def _say_what_is_lost(result: Result, metrics: Metrics) -> None:
    """Names the columns that were not written, and why."""
    log = result.get(FORGET, {})
    by_others = [n for n in _MEMORIZATION if n in log and n not in metrics]
    if HOLDOUT in result:
        by_others += [n for m, (_, n) in _ATTACKS.items() if n in log and m not in metrics]
    if by_others:
        logger.warning(
            f"{EVAL} is without {', '.join(by_others)}, which are counted otherwise than there "
            f"({conventions_of(log, min_k=True) or 'papers'}): evaluate with --memorization "
            "open-unlearning and no --min-k-share to have them"
        )
    kept = {*_LOSSES.values(), *_ROUGE, *_MEMORIZATION, "generated_text", *ENTRIES}
    kept |= {name for _, name in _ATTACKS.values()} if HOLDOUT in result else set()
    lost = sorted({name for log in result.values() for name in log} - kept)
    if RETAIN in result and any(name in result[RETAIN] for name in _MEMORIZATION):
        lost.append("memorization of the retain set")
    if lost:
        logger.info(f"{EVAL} has no place for {', '.join(lost)}")
