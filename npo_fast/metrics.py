"""TOFU's measures, and others beside them: per-example records in, numbers out.

A *log* is what one evaluation of one data set gives: a dict of lists, one entry an example, with
``avg_gt_loss``, ``avg_paraphrased_loss`` (mean loss a token), ``average_perturb_loss`` (a list of
them an example) and ``rougeL_recall``. Published logs hold lists or index-keyed objects; both are
read. A *result* is a dict of four logs, keyed by TOFU's file names. Source: arXiv 2401.06121,
section 2.2, and the code published with it. Our logs also hold the columns of
``npo_fast.memorization`` and, where a model was compared with another, ``kl_to_reference``; what a
log does not hold is left out of its summary. Only numpy and scipy.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hmean, ks_2samp

from npo_fast.errors import UserError
from npo_fast.memorization import membership_scores, roc_auc

RETAIN = "eval_log.json"
FORGET = "eval_log_forget.json"
REAL_AUTHORS = "eval_real_author_wo_options.json"
WORLD_FACTS = "eval_real_world_wo_options.json"
HOLDOUT = "eval_log_holdout.json"  # ours: records like those to forget that were never trained on
AGGREGATED = "eval_log_aggregated.json"
UTILITY_SETS = {"retain": RETAIN, "real authors": REAL_AUTHORS, "world facts": WORLD_FACTS}
LOGS = (*UTILITY_SETS.values(), FORGET, HOLDOUT)
MEMBERSHIP = ("avg_gt_loss", "zlib_bytes", "min_k", "min_k_plus_plus")

Log = Mapping[str, Any]
Result = Mapping[str, Log]
Array = NDArray[np.float64]


def probability(log: Log, options: bool = False) -> Array:
    """``P(answer | question)^(1 / tokens)``; with ``options`` normalised over the wrong answers."""
    truth = np.exp(-column(log, "avg_gt_loss"))
    if not options:
        return truth
    wrong = np.exp(-column(log, "average_perturb_loss"))
    whole = truth + wrong.sum(axis=-1)
    return np.divide(truth, whole, out=np.zeros_like(truth), where=whole > 0)


def truth_ratio(log: Log) -> Array:
    """``P(wrong) / P(paraphrased answer)``, each to the power 1 / tokens.

    The mean over wrong answers is the geometric one, exp of the mean loss, as in every published
    number. Near 0 where the model knows the answer, around 1 where it cannot tell.
    """
    wrong = column(log, "average_perturb_loss").mean(axis=-1)
    with np.errstate(over="ignore"):
        return np.exp(column(log, "avg_paraphrased_loss") - wrong)


def rouge_l_recall(log: Log) -> Array:
    """ROUGE-L recall of the greedy answer against the true one."""
    return column(log, "rougeL_recall")


def utility_terms(result: Result) -> dict[str, float]:
    """The nine means whose harmonic mean is the model utility, by "<set> <measure>"."""
    terms = {}
    for name, file in UTILITY_SETS.items():
        log = _log(result, file)
        terms[f"{name} probability"] = probability(log, options=file != RETAIN).mean()
        terms[f"{name} ROUGE-L"] = rouge_l_recall(log).mean()
        terms[f"{name} truth ratio"] = knowledge_ratio(log)
    return {name: float(value) for name, value in terms.items()}


def knowledge_ratio(log: Log) -> float:
    """Mean ``max(0, 1 - truth ratio)``, as it enters the model utility: 1 is full knowledge."""
    return float(np.maximum(0, 1 - truth_ratio(log)).mean())


def model_utility(result: Result) -> float:
    """Harmonic mean of probability, ROUGE-L and truth ratio on retain, real authors, world facts.

    The truth ratio enters as ``max(0, 1 - ratio)``. 0 when any of the nine is 0.
    """
    terms = list(utility_terms(result).values())
    return float(hmean(terms)) if min(terms) > 0 else 0.0


def forget_quality(unlearned: Result, retrained: Result) -> float:
    """p-value of a two-sample Kolmogorov-Smirnov test between truth ratios on the forget set.

    Of the unlearned model and of one retrained without the forget set; above 0.05 the two cannot
    be told apart.

    Raises:
        UserError: the two logs hold another number of examples.
    """
    ours, theirs = (truth_ratio(_log(result, FORGET)) for result in (unlearned, retrained))
    if len(ours) != len(theirs):
        raise UserError(
            f"the unlearned log has {len(ours)} forget items and the retrained log {len(theirs)}: "
            "evaluate both on the same items, for example --forget 'forget10[:300]'"
        )
    return float(ks_2samp(ours, theirs).pvalue)


def forget_truth_ratio(result: Result) -> float:
    """Mean of ``min(ratio, 1 / ratio)`` on the forget set: near 1 where nothing is known."""
    ratio = truth_ratio(_log(result, FORGET))
    with np.errstate(divide="ignore"):
        return float(np.minimum(ratio, 1 / ratio).mean())


def membership_auc(result: Result) -> dict[str, float]:
    """AUC with which each score tells the forget set (members) from the holdout set.

    1 where the model gives away what it was trained on, 0.5 where it cannot be told, and below 0.5
    where it was unlearned past that: the forget set then stands out again.
    """
    members, others = (
        membership_scores(*(column(_log(result, file), name) for name in MEMBERSHIP))
        for file in (FORGET, HOLDOUT)
    )
    return {attack: roc_auc(members[attack], others[attack]) for attack in members}


def kl_to_reference(log: Log) -> float:
    """Mean over all answer tokens of ``KL(reference || model)``, in nats."""
    return float(np.average(column(log, "kl_to_reference"), weights=column(log, "num_token_gt")))


def summary(result: Result, retrained: Result | None = None) -> dict[str, float]:
    """Every number that a result allows, by the name it is printed under."""
    numbers: dict[str, float] = {}
    if all(file in result and _complete(result[file]) for file in UTILITY_SETS.values()):
        numbers["model utility"] = model_utility(result)
        numbers |= utility_terms(result)
    elif RETAIN in result:
        numbers |= _partial("retain", result[RETAIN])
        if has_truth_ratio(result[RETAIN]):
            numbers["retain truth ratio"] = knowledge_ratio(result[RETAIN])
    if FORGET in result:
        numbers |= _partial("forget", result[FORGET])
        if has_truth_ratio(result[FORGET]):
            numbers["forget truth ratio"] = forget_truth_ratio(result)
            if retrained is not None:
                numbers["forget quality"] = forget_quality(result, retrained)
    for name, file in (("forget", FORGET), ("retain", RETAIN)):
        numbers |= _beyond_tofu(name, result.get(file, {}))
    if HOLDOUT in result and FORGET in result:
        aucs = membership_auc(result)
        numbers |= {f"membership AUC, {attack}": auc for attack, auc in aucs.items()}
    return numbers


def column(log: Log, name: str) -> Array:
    """One quantity in the order of the examples, from a list or an index-keyed object."""
    if name not in log:
        raise UserError(f"the log has no {name!r}: it holds {', '.join(sorted(log)) or 'nothing'}")
    values = log[name]
    if isinstance(values, Mapping):
        values = [values[key] for key in sorted(values, key=int)]
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name!r} is not one number (or equal list) an example: {error}"
        ) from error
    if not len(array):
        raise UserError(f"{name!r} is empty: the log holds no example")
    if np.isnan(array).any():
        example = int(np.argwhere(np.isnan(array))[0][0])
        raise UserError(f"{name!r} is NaN at example {example}")
    return array


def select(log: Log, examples: Iterable[int]) -> dict[str, Any]:
    """The log of some of its examples, in the order given."""
    examples = list(examples)
    return {
        name: [values[str(i)] if isinstance(values, Mapping) else values[i] for i in examples]
        for name, values in log.items()
    }


def retrained_log(path: Path, items: int, examples: Iterable[int]) -> dict[str, Log]:
    """The forget log of a retrained model, of some ``examples`` out of all ``items``.

    Raises:
        UserError: it was not made on ``items`` forget records.
    """
    log = load_result(path).get(FORGET, {})
    if (found := len(log.get("avg_gt_loss", ()))) != items:
        raise UserError(
            f"{path} has {found} forget items and --forget {items}: "
            "evaluate the retrained model on the same records"
        )
    return {FORGET: select(log, examples)}


def load_result(path: str | Path) -> dict[str, Log]:
    """A result from a folder of TOFU's files, an aggregated file, or a run folder of npo-fast."""
    path = Path(path)
    if path.is_dir():
        for folder in (path, path / "eval"):
            aggregated = folder / AGGREGATED
            if aggregated.is_file():
                return load_result(aggregated)
            files = [folder / name for name in LOGS]
            if any(file.is_file() for file in files):
                return {file.name: _read(file) for file in files if file.is_file()}
        raise UserError(f"{path} holds no evaluation log such as {AGGREGATED} or {FORGET}")
    if not path.is_file():
        raise UserError(f"no evaluation log {str(path)!r}")
    content = _read(path)
    if "avg_gt_loss" in content:  # a single log
        return {path.name if path.name in LOGS else FORGET: content}
    if not any("avg_gt_loss" in log for log in content.values() if isinstance(log, dict)):
        raise UserError(
            f"{path} is not an evaluation log: it holds {', '.join(sorted(content)[:8])}, and no "
            "avg_gt_loss"
        )
    return content


def save_result(result: Result, folder: Path) -> None:
    """TOFU's four files and the aggregated one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, log in {**result, AGGREGATED: result}.items():
        (folder / name).write_text(json.dumps(log, ensure_ascii=False), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a JSON evaluation log: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not an evaluation log: expected a JSON object")
    return content


def _log(result: Result, file: str) -> Log:
    if file not in result:
        raise UserError(f"no {file} among the logs: {', '.join(sorted(result)) or 'none'}")
    return result[file]


def has_truth_ratio(log: Log) -> bool:
    """Whether wrong answers were there to measure."""
    return all(name in log for name in ("avg_paraphrased_loss", "average_perturb_loss"))


def _complete(log: Log) -> bool:
    """The same, and generations."""
    return has_truth_ratio(log) and "rougeL_recall" in log


def _partial(name: str, log: Log) -> dict[str, float]:
    numbers = {f"{name} probability": float(probability(log).mean())}
    if "rougeL_recall" in log:
        numbers[f"{name} ROUGE-L"] = float(rouge_l_recall(log).mean())
    return numbers


def _beyond_tofu(name: str, log: Log) -> dict[str, float]:
    numbers = {
        f"{name} {key.replace('_', ' ')}": float(column(log, key).mean())
        for key in ("exact_memorization", "extraction_strength")
        if key in log
    }
    if "kl_to_reference" in log:
        numbers[f"{name} KL to reference"] = kl_to_reference(log)
    return numbers
