"""Evaluation logs in memory: names, columns, examples. ``npo_fast.metrics.files`` reads and writes.

A *log* holds one evaluation of one data set: a dict of columns, one entry an example, such as
``avg_gt_loss`` and ``avg_paraphrased_loss`` (mean loss a token), ``average_perturb_loss`` (a list
of mean losses an example) and ``rougeL_recall``. Published logs hold lists or index-keyed objects;
both are read. A *result* is a dict of logs, keyed by TOFU's file names. Source: arXiv 2401.06121,
section 2.2, and the code published with it.

Logs of npo_fast also hold the columns of ``npo_fast.metrics.memorization`` and, where a model was
compared with another, ``kl_to_reference``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npo_fast.errors import UserError

RETAIN = "eval_log.json"
FORGET = "eval_log_forget.json"
REAL_AUTHORS = "eval_real_author_wo_options.json"
WORLD_FACTS = "eval_real_world_wo_options.json"
HOLDOUT = "eval_log_holdout.json"  # npo_fast's own: records like the forget set, never trained on
AGGREGATED = "eval_log_aggregated.json"
UTILITY_SETS = {"retain": RETAIN, "real authors": REAL_AUTHORS, "world facts": WORLD_FACTS}
SETS = {"forget": FORGET, "retain": RETAIN}
LOGS = (*UTILITY_SETS.values(), FORGET, HOLDOUT)
TRUTH_RATIO_COLUMNS = ("avg_paraphrased_loss", "average_perturb_loss")
CONVENTIONS = "conventions"  # an entry of a log that is no column: ``Conventions.entry``
VOCABULARY = "vocabulary"  # another: how many tokens the model chooses from
ENTRIES = (CONVENTIONS, VOCABULARY)

Log = Mapping[str, Any]  # column -> values by example
Result = Mapping[str, Log]  # file name -> log
Array = NDArray[np.float64]


def values_of(log: Log, name: str) -> list[Any]:
    """Returns what a column holds, such as texts, in the order of the examples.

    Raises:
        UserError: the column is missing.
    """
    if name not in log:
        raise UserError(f"the log has no {name!r}: it holds {', '.join(sorted(log)) or 'nothing'}")
    values = log[name]
    if isinstance(values, Mapping):
        values = [values[key] for key in sorted(values, key=int)]
    return list(values)


def examples_in(log: Log) -> int:
    """Returns how many examples the log holds."""
    return next((len(values) for name, values in log.items() if name not in ENTRIES), 0)


def column(log: Log, name: str) -> Array:
    """Returns one column in the order of the examples, from a list or an index-keyed object.

    Raises:
        UserError: the column is missing, empty, ragged, not numeric, or holds a NaN.
    """
    try:
        array = np.asarray(values_of(log, name), dtype=np.float64)
    except (TypeError, ValueError) as error:
        message = f"{name!r} is not one number (or equal list) an example: {error}"
        raise UserError(message) from error
    if not len(array):
        raise UserError(f"{name!r} is empty: the log holds no example")
    if np.isnan(array).any():
        example = int(np.argwhere(np.isnan(array))[0][0])
        raise UserError(f"{name!r} is NaN at example {example}")
    return array


def check_comparable(retrained: Result) -> None:
    """Checks that the logs of a retrained model hold what forget quality compares.

    Raises:
        UserError: there is no forget log, or it has no losses of wrong answers.
    """
    if not has_truth_ratio(retrained.get(FORGET, {})):
        raise UserError(
            "--retrained compares truth ratios of the forget set, and its logs have none: evaluate "
            "the retrained model on forget records with wrong answers, or leave it out"
        )


def has_truth_ratio(log: Log) -> bool:
    """Whether the log holds the losses of wrong answers, from which truth ratios are computed."""
    return all(name in log for name in TRUTH_RATIO_COLUMNS)


def log_of(result: Result, file: str) -> Log:
    """Returns the log with this file name, or raises a ``UserError``."""
    if file not in result:
        raise UserError(f"no {file} among the logs: {', '.join(sorted(result)) or 'none'}")
    return result[file]


def select(log: Log, examples: Iterable[int]) -> dict[str, Any]:
    """Returns the log of these examples, in the order given."""
    examples = list(examples)
    selected = {}
    for name, values in log.items():
        if name not in ENTRIES:
            values = [
                values[str(i)] if isinstance(values, Mapping) else values[i] for i in examples
            ]
        selected[name] = values
    return selected
