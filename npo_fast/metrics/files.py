"""Evaluation logs as files, in two forms: TOFU's and open-unlearning's.

"tofu" is a JSON file a data set, and all of them in ``eval_log_aggregated.json``. "open-unlearning"
is ``TOFU_EVAL.json`` with its ``TOFU_SUMMARY.json``; see ``npo_fast.metrics.open_unlearning``.
Both are read wherever logs are read. Logs of MUSE are one file, ``muse_eval.json``.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from npo_fast.boundary import read_json
from npo_fast.errors import UserError, named
from npo_fast.metrics import open_unlearning
from npo_fast.metrics.logs import (
    AGGREGATED,
    FORGET,
    LOGS,
    TRUTH_RATIO_COLUMNS,
    Log,
    Result,
    check_answers,
    check_comparable,
    check_result,
    select,
)
from npo_fast.metrics.muse import is_muse

logger = logging.getLogger(__name__)

LogForm = Literal["tofu", "open-unlearning"]
FILES = {  # by form; the first tells the form of a folder
    "tofu": (AGGREGATED, *LOGS),
    "open-unlearning": (open_unlearning.EVAL, open_unlearning.SUMMARY),
    "muse": ("muse_eval.json",),
}
LOG_FILES = tuple(name for names in FILES.values() for name in names)
_FOLDERS = ("", "eval", "evals")  # of a run, where logs are: npo_fast's, open-unlearning's


def holds_logs(folder: Path) -> bool:
    """Whether there is an evaluation log, of any form, in the folder itself."""
    return any((folder / name).is_file() for name in LOG_FILES)


def load_result(path: str | Path) -> dict[str, Log]:
    """Reads logs of either form: a folder of them, a file with all or one, a run folder.

    Raises:
        UserError: ``path`` holds no evaluation log, one that is not JSON, or logs of both forms.
    """
    path = Path(path)
    result = _load(path)
    with named(str(path)):
        check_result(result)
    return result


def _load(path: Path) -> dict[str, Log]:
    if path.is_dir():
        folder = next((path / name for name in _FOLDERS if holds_logs(path / name)), None)
        if folder is None:
            raise UserError(
                f"{path} holds no evaluation log such as {AGGREGATED}, {FORGET} or "
                f"{open_unlearning.EVAL}"
            )
        return _load_folder(folder)
    if not path.exists():
        raise UserError(f"no evaluation log {str(path)!r}")
    content = _read(path)
    if open_unlearning.is_eval(content):
        return open_unlearning.read(content, str(path))
    if open_unlearning.is_summary(content):
        if path.name == open_unlearning.SUMMARY and path.with_name(open_unlearning.EVAL).is_file():
            logger.info(f"{path} holds means alone: {open_unlearning.EVAL} beside it is read")
            return _load(path.with_name(open_unlearning.EVAL))
        raise UserError(
            f"{path} holds means alone, and measures are computed from the values of each example: "
            f"name the {open_unlearning.EVAL} of the same evaluation"
        )
    if _is_log(content):
        return {path.name if path.name in LOGS else FORGET: content}
    if not any(isinstance(log, dict) and _is_log(log) for log in content.values()):
        raise UserError(
            f"{path} is not an evaluation log: it holds {', '.join(sorted(content)[:8])}, and no "
            "avg_gt_loss"
        )
    return content


def retrained_log(
    retrained: Path | Result, answers: Sequence[str | None], examples: Iterable[int]
) -> dict[str, Log]:
    """Reads the forget log of a retrained model and selects ``examples`` of it.

    Args:
        answers: the right answers of the forget records, None where one is not known.

    Raises:
        UserError: the log was made on other records, or has no truth ratios.
    """
    result = load_result(retrained) if isinstance(retrained, Path) else retrained
    name = retrained if isinstance(retrained, Path) else "the retrained log"
    check_answers(result.get(FORGET, {}), answers, name)
    check_comparable(result)
    return {FORGET: select(result[FORGET], examples)}


def save_result(
    result: Result, folder: Path, form: LogForm = "tofu", retrained: Result | None = None
) -> None:
    """Writes logs into ``folder``, in place of those that are there.

    Args:
        form: of the files: "tofu", or "open-unlearning", which has no place for some columns and
            says which.
        retrained: logs of the retrained model, for the forget quality in the second form.
    """
    files: dict[str, Any] = {**result, AGGREGATED: result}
    indent = None
    if is_muse(result):
        files = {FILES["muse"][0]: result}
    elif form == "open-unlearning":
        metrics, indent = open_unlearning.metrics_of(result, retrained), 4
        files = {
            open_unlearning.EVAL: metrics,
            open_unlearning.SUMMARY: open_unlearning.summary_of(metrics),
        }
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f"{name}.partial" for name in files}
    try:  # beside those that are there, which a full disk must not cost
        for name, content in files.items():
            text = _json(content, indent)
            partial[name].write_text(text, encoding="utf-8")
    except OSError:
        for path in partial.values():
            path.unlink(missing_ok=True)
        raise
    for name in {*LOG_FILES} - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name, path in partial.items():
        path.replace(folder / name)


def _json(content: Any, indent: int | None) -> str:
    """JSON with letters as they are, unless there are half characters, which UTF-8 lacks."""
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, indent=indent)
    return text


def _load_folder(folder: Path) -> dict[str, Log]:
    """Reads the logs in a folder that ``holds_logs``."""
    forms = [form for form, names in FILES.items() if any((folder / n).is_file() for n in names)]
    if len(forms) > 1:
        names = " or ".join(FILES[form][0] for form in forms)
        raise UserError(f"{folder} holds logs in {len(forms)} forms: name {names} in it")
    first, *others = FILES[forms[0]]
    if (folder / first).is_file():
        return _load(folder / first)
    if forms[0] == "open-unlearning":
        return _load(folder / open_unlearning.SUMMARY)
    files = [folder / name for name in others]
    return {file.name: _read(file) for file in files if file.is_file()}


def _is_log(content: dict[str, Any]) -> bool:
    return any(name in content for name in ("avg_gt_loss", *TRUTH_RATIO_COLUMNS, "min_k"))


def _read(path: Path) -> dict[str, Any]:
    return dict(read_json(path, dict[str, Any], "name an evaluation log"))
