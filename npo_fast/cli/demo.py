"""``npo-fast demo``: the paper's effect on a model small enough to watch."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npo_fast import tables
from npo_fast.cli.console import Output
from npo_fast.validation import Checked, check_output

if TYPE_CHECKING:
    from npo_fast.experiments.demo.experiment import Demo, Outcome

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command(Checked):
    """Options of npo-fast demo."""

    output: Path = Path("npo-fast-demo")
    """Folder for the page, the models, the evaluation logs and the step records."""
    overwrite: bool = False
    """Replace the demo that is in the output folder."""
    seed: int = 0
    """Seed of the made-up facts, the model and the training: the same seed, the same result."""


def run(command: Command) -> Output:
    """Runs the demo; returns what each method forgot and kept."""
    folder = command.output
    check_output(folder, "result.json", "a demo", command.overwrite, alone=True)
    started = time.perf_counter()
    from npo_fast.experiments.demo.experiment import Demo, DemoSettings, make_room
    from npo_fast.runs.preflight import check_writable

    check_writable(folder, "--output")
    make_room(folder)
    demo = Demo(folder, command.seed, DemoSettings())
    logging.getLogger("npo_fast.runs").setLevel(logging.WARNING)  # seven runs, a line each is much
    dataset = demo.dataset
    logger.info(
        f"made-up authors: {len(dataset.forget)} facts to forget, {len(dataset.retain)} to "
        f"keep, {len(dataset.famous) + len(dataset.countries)} that the model knew before"
    )
    outcomes = demo.run()
    time_s = time.perf_counter() - started
    result = demo.describe(outcomes, time_s)
    demo.write(outcomes, result)
    return Output(result, _text(demo, outcomes, time_s))


def _text(demo: "Demo", outcomes: Mapping[str, "Outcome"], time_s: float) -> str:
    original = outcomes["original"].model_utility or 1.0

    def row(name: str, outcome: "Outcome") -> list[str]:
        best = f"{tables.number(outcome.best.forget_quality)} (epoch {outcome.best.epoch})"
        utility = f"{outcome.model_utility:.3f} ({outcome.model_utility / original:.0%})"
        return [
            name,
            best if outcome.time_s else "",
            tables.number(outcome.last.forget_quality),
            utility,
            outcome.verdict.outcome,
        ]

    header = ("model", "forget quality: best", "at the end", "utility at the end", "verdict")
    lines = [tables.plain((row(name, outcome) for name, outcome in outcomes.items()), header)]
    lines.append(
        "\nforget quality: p-value against the model that was never taught (above 0.05: no "
        "difference seen)\nutility: of what was to be kept, and share of the original's"
    )
    for which, record in demo.shown.items():
        lines += ["", f"{which}: {record.question}", f"  {'truth':<10}{record.answer}"]
        lines += [f"  {name:<10}{outcome.answers[which]}" for name, outcome in outcomes.items()]
    conclusion = demo.describe(outcomes, time_s)["conclusion"]
    lines.append(f"\n{conclusion[0].upper()}{conclusion[1:]}".replace("; ", ";\n"))
    lines.append(
        f"\n{time_s:.0f} s; the page is {demo.folder / 'report.html'}, the plot unlearning.png "
        "beside it,\nand every model goes on as it is: "
        f"npo-fast unlearn --model {demo.folder / 'original'} --data {demo.folder / 'data'} "
        "--forget forget --retain retain"
    )
    return "\n".join(lines)
