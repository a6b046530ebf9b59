"""Evaluation logs in memory: names, columns, examples. ``npo_fast.metrics.files`` reads and writes.

A *log* holds one evaluation of one data set: a dict of columns, one entry an example, such as
``avg_gt_loss`` and ``avg_paraphrased_loss`` (mean loss a token), ``average_perturb_loss`` (a list
of mean losses an example) and ``rougeL_recall``. Published logs hold lists or index-keyed objects;
both are read. A *result* is a dict of logs, keyed by TOFU's file names. Source: arXiv 2401.06121,
section 2.2, and the code published with it.

Logs of npo_fast also hold the columns of ``npo_fast.metrics.memorization``; where a model was
compared with another, ``kl_to_reference``, ``avg_reference_loss`` (of the right answers) and
``generated_loss`` (a sum over ``num_token_generated`` tokens of the model's own answer), both under
the reference; and columns that end in ``REPHRASED``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npo_fast.errors import UserError, named, short
from npo_fast.validation import check_shape

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
TEXTS = "generated_text"  # the column of question, generated answer and right answer
REPHRASED = "_paraphrased_question"  # ends the columns of answers to the question in other words
CONVENTIONS = "conventions"  # an entry of a log that is no column: ``Conventions.entry``
VOCABULARY = "vocabulary"  # another: how many tokens the model chooses from
ENTRIES = (CONVENTIONS, VOCABULARY)

_INDEX = re.compile(r"[0-9]{1,18}")  # of an example
_ROWS_OF_TEXTS = (TEXTS, TEXTS + REPHRASED)
_TEXT_COLUMNS: Mapping[str, Any] = {
    **dict.fromkeys(_ROWS_OF_TEXTS, list[list[str]]), "ending": list[str | None]
}  # fmt: skip

Log = Mapping[str, Any]  # column -> values by example
Result = Mapping[str, Log]  # file name -> log
Array = NDArray[np.float64]


def check_result(result: Any) -> None:
    """Checks that logs from outside have their form: columns of equal length, texts as texts.

    Numbers are checked where they are read, by ``column``.

    Raises:
        UserError: the message names log and column.
    """
    check_shape(result, dict[str, dict[str, Any]])
    for file, log in result.items():
        columns = {name: values for name, values in log.items() if name not in ENTRIES}
        with named(file):
            check_shape(columns, dict[str, list[Any] | dict[str, Any]])
            check_shape(size := log.get(VOCABULARY, 2), int, VOCABULARY)
            if size < 2:
                raise UserError(f"{VOCABULARY!r} must be 2 tokens or more, got {size}")
            for name, values in columns.items():
                if isinstance(values, dict):
                    with named(name):
                        check_indices(values)
            lengths = {name: len(values) for name, values in columns.items()}
            for name, length in lengths.items():
                first, expected = next(iter(lengths.items()))
                if length != expected:
                    raise UserError(
                        f"{name!r} is of {length} examples and {first!r} of {expected}: they must "
                        "be of the same"
                    )
            for name, hint in _TEXT_COLUMNS.items():
                if name in columns:
                    check_shape(values_of(columns, name), hint, name)
            for name in columns.keys() & {*_ROWS_OF_TEXTS}:
                if any(len(row) != 3 for row in values_of(columns, name)):
                    raise UserError(f"{name!r} has rows without question, answer and right answer")


def check_indices(by_example: Iterable[str]) -> None:
    """Raises ``UserError`` for keys that are no numbers of examples."""
    if wrong := [key for key in by_example if not _INDEX.fullmatch(key)]:
        raise UserError(f"{short(wrong[0])} is no number of an example")


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


def right_answers(log: Log) -> list[str] | None:
    """Returns what the generated answers were compared with; None where the log has no texts."""
    return [str(row[2]) for row in values_of(log, TEXTS)] if TEXTS in log else None


def same_records(ours: Result, theirs: Result) -> bool:
    """Whether the logs of both models are of the same records, as far as they tell."""
    for file in ours.keys() & theirs.keys():
        answers = right_answers(ours[file]), right_answers(theirs[file])
        if None not in answers and answers[0] != answers[1]:
            return False
        if examples_in(ours[file]) != examples_in(theirs[file]):
            return False
    return True


def check_answers(theirs: Log, answers: Sequence[str | None], name: Any) -> None:
    """Checks that the forget log of a retrained model is of the records with these answers.

    Args:
        answers: right answers, None where one is not known.
        name: of the log, in messages.

    Raises:
        UserError: other answers, as far as the log has them, or another number.
    """
    if (logged := examples_in(theirs)) != len(answers):
        raise UserError(
            f"{name} has {logged} forget items and --forget {len(answers)}: "
            "evaluate the retrained model on the same records"
        )
    pairs = zip(right_answers(theirs) or answers, answers, strict=True)
    for number, (logged_answer, answer) in enumerate(pairs, 1):
        if logged_answer is None or answer is None:
            continue
        if logged_answer.split() != answer.split():
            raise UserError(
                f"{name} is of other records: the right answer to its record {number} is "
                f"{short(logged_answer)}, and that of --forget {short(answer)}: evaluate the "
                "retrained model on the same records"
            )


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
    except (TypeError, ValueError, OverflowError) as error:
        message = f"{name!r} is not one number (or equal list) an example: {error}"
        raise UserError(message) from error
    if not array.size:
        raise UserError(f"{name!r} is empty: the log holds no example")
    if array.ndim > 1 + (name == "average_perturb_loss"):
        raise UserError(f"{name!r} is not one number an example, but {array[0].size} of them")
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
            values = values_of(log, name)
            values = [values[i] for i in examples]
        selected[name] = values
    return selected
