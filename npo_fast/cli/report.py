"""``npo-fast report``: one page about runs, beside the models they are judged by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from npo_fast.cli.console import Output


@dataclass(frozen=True)
class Command:
    """Options of npo-fast report."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders of npo-fast unlearn or finetune."""
    original: Path | None = None
    """Evaluation logs of the model before unlearning."""
    retrained: Path | None = None
    """Evaluation logs of a model trained without the forget set: for forget quality."""
    output: Path = Path("report.html")
    """The page to write. Its table goes beside it as Markdown, with the suffix .md."""
    answers: int = 20
    """Questions to show of each set."""


def run(command: Command) -> Output:
    """Writes the report; returns what it lacks."""
    from npo_fast.runs.reporting import report

    page, table = command.output, command.output.with_suffix(".md")
    result = report(
        command.runs, original=command.original, retrained=command.retrained, output=page,
        answers=command.answers,
    )  # fmt: skip
    return Output(
        {
            "output": str(page),
            "markdown": str(table),
            "runs": result.rows,
            "missing": result.missing,
        },
        "\n".join(
            [
                *(f"{name}: {verdict}" for name, verdict in result.verdicts),
                *(["", "What is missing, and the command that adds it:"] if result.missing else []),
                *(f"- {sentence}" for sentence in result.missing),
                "",
                f"{page} and {table} are written",
            ]
        ).lstrip(),
    )
