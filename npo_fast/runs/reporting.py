"""``report``: one page about runs, beside the models they are judged by."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from npo_fast.boundary import read_bytes
from npo_fast.errors import UserError
from npo_fast.model.save import save_file
from npo_fast.reports.html import MARK
from npo_fast.reports.page import Report
from npo_fast.reports.runs import load_runs
from npo_fast.runs.run import Run
from npo_fast.runs.scores import Logs, logs_of
from npo_fast.validation import with_checked_keywords


@with_checked_keywords
def report(
    runs: Run | str | Path | Iterable[Run | str | Path],
    *,
    original: Logs | None = None,
    retrained: Logs | None = None,
    output: str | Path = "report.html",
    answers: int = 20,
) -> Report:
    """Writes one HTML page about runs, and its table as Markdown beside it: ``npo-fast report``.

    Args:
        runs: runs, or their folders.
        original: evaluation logs of the model before unlearning.
        retrained: evaluation logs of a model trained without the forget set.
        output: the page.
        answers: questions to show of each set.

    Returns:
        The report: its ``rows``, and what is ``missing`` with the command that makes it.

    Raises:
        UserError: a folder that is not a run's, or a file that is not a report and would be lost.
    """
    page = Path(output)
    several = isinstance(runs, Iterable) and not isinstance(runs, str)
    given: Any = list(runs) if several else [runs]  # type: ignore[arg-type]
    for run in given:
        if not isinstance(run, (str, Path, Run)):
            raise UserError(f"runs must be runs or their folders, got {run!r}")
    folders = [run.folder if isinstance(run, Run) else Path(run) for run in given]
    if not folders:
        raise UserError("name one run folder or more: npo-fast report runs/npo runs/ga")
    if answers < 0:
        raise UserError(f"--answers must be 0 or more, got {answers}")
    if page.suffix not in (".html", ".htm"):
        raise UserError(f"--output {page} must end in .html")
    files = page, page.with_suffix(".md")
    for file in files:
        if file.is_dir():
            raise UserError(f"{file} is a folder; name a file with --output")
        if file.exists() and MARK.encode() not in read_bytes(file)[:800]:
            raise UserError(f"{file} is not a report of npo-fast; name another --output")
    result = Report(
        load_runs(folders),
        {} if original is None else logs_of(original, "original"),
        {} if retrained is None else logs_of(retrained, "retrained"),
        answers,
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    for file, content in zip(files, (result.html(), result.markdown()), strict=True):
        save_file(file, partial(Path.write_text, data=content, encoding="utf-8"))
    return result
