"""``npo-fast report``: one page about runs, beside the models they are judged by."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from npo_fast.cli.console import show
from npo_fast.cli.settings import Common
from npo_fast.errors import UserError
from npo_fast.metrics import Result, load_result
from npo_fast.report.html import MARK
from npo_fast.report.page import Report
from npo_fast.report.runs import load_runs


@dataclass(frozen=True)
class PageOptions:
    """What to show, and where to put it."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders of npo-fast unlearn (or finetune)."""
    original: Path | None = None
    """Evaluation logs of the model before unlearning."""
    retrained: Path | None = None
    """Evaluation logs of a model trained without the forget set: for forget quality."""
    output: Path = Path("report.html")
    """The page; its table as Markdown goes beside it, with the suffix .md."""
    answers: int = 20
    """Questions to show of each set."""


@dataclass(frozen=True)
class Command:
    page: PageOptions = field(default_factory=PageOptions)
    common: Common = field(default_factory=Common)


def run(command: Command) -> None:
    page = command.page
    if not page.runs:
        raise UserError("name one run folder or more: npo-fast report runs/npo runs/ga")
    if page.answers < 0:
        raise UserError(f"--answers must be 0 or more, got {page.answers}")
    if page.output.suffix not in (".html", ".htm"):
        raise UserError(f"--output {page.output} must end in .html")
    files = page.output, page.output.with_suffix(".md")
    for file in files:
        _check_ours(file)
    report = Report(load_runs(page.runs), _logs(page.original), _logs(page.retrained), page.answers)
    page.output.parent.mkdir(parents=True, exist_ok=True)
    for file, content in zip(files, (report.html(), report.markdown()), strict=True):
        file.write_text(content, encoding="utf-8")
    show(
        {
            "output": str(files[0]),
            "markdown": str(files[1]),
            "runs": report.rows,
            "missing": report.missing,
        },
        "\n".join([*report.missing, f"{files[0]} and {files[1]} are written"]),
        command.common.json,
    )


def _logs(path: Path | None) -> Result:
    return {} if path is None else load_result(path)


def _check_ours(file: Path) -> None:
    """A report may be made anew; another file is not written over."""
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file with --output")
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace")[:200]:
        raise UserError(f"{file} is not a report of npo-fast; name another --output")
