"""Evaluation logs in TOFU's JSON form: names, reading, writing, columns.

A *log* holds one evaluation of one data set: a dict of columns, one entry an example, such as
``avg_gt_loss`` and ``avg_paraphrased_loss`` (mean loss a token), ``average_perturb_loss`` (a list
of mean losses an example) and ``rougeL_recall``. Published logs hold lists or index-keyed objects;
both are read. A *result* is a dict of logs, keyed by TOFU's file names. Source: arXiv 2401.06121,
section 2.2, and the code published with it.

Logs of npo_fast also hold the columns of ``npo_fast.metrics.memorization`` and, where a model was
compared with another, ``kl_to_reference``.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
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
LOGS = (*UTILITY_SETS.values(), FORGET, HOLDOUT)
TRUTH_RATIO_COLUMNS = ("avg_paraphrased_loss", "average_perturb_loss")
CONVENTIONS = "conventions"  # the entry of a log that is no column: ``Conventions.entry``

Log = Mapping[str, Any]  # column -> values by example
Result = Mapping[str, Log]  # file name -> log
Array = NDArray[np.float64]


def column(log: Log, name: str) -> Array:
    """Returns one column in the order of the examples, from a list or an index-keyed object.

    Raises:
        UserError: the column is missing, empty, ragged, not numeric, or holds a NaN.
    """
    if name not in log:
        raise UserError(f"the log has no {name!r}: it holds {', '.join(sorted(log)) or 'nothing'}")
    values = log[name]
    if isinstance(values, Mapping):
        values = [values[key] for key in sorted(values, key=int)]
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        message = f"{name!r} is not one number (or equal list) an example: {error}"
        raise UserError(message) from error
    if not len(array):
        raise UserError(f"{name!r} is empty: the log holds no example")
    if np.isnan(array).any():
        example = int(np.argwhere(np.isnan(array))[0][0])
        raise UserError(f"{name!r} is NaN at example {example}")
    return array


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
        if name != CONVENTIONS:
            values = [
                values[str(i)] if isinstance(values, Mapping) else values[i] for i in examples
            ]
        selected[name] = values
    return selected


def load_result(path: str | Path) -> dict[str, Log]:
    """Reads a result: a folder of TOFU's files, an aggregated file, one log, or a run folder.

    Raises:
        UserError: ``path`` holds no evaluation log, or one that is not JSON.
    """
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


def retrained_log(retrained: Path | Result, items: int, examples: Iterable[int]) -> dict[str, Log]:
    """Reads the forget log of a retrained model and selects ``examples`` of its ``items``.

    Raises:
        UserError: the log was not made on ``items`` forget records.
    """
    result = load_result(retrained) if isinstance(retrained, Path) else retrained
    log = result.get(FORGET, {})
    name = retrained if isinstance(retrained, Path) else "the retrained log"
    if (logged := len(log.get("avg_gt_loss", ()))) != items:
        raise UserError(
            f"{name} has {logged} forget items and --forget {items}: "
            "evaluate the retrained model on the same records"
        )
    return {FORGET: select(log, examples)}


def save_result(result: Result, folder: Path) -> None:
    """Writes each log to its file in ``folder``, and all of them to the aggregated file."""
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
