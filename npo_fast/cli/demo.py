"""``npo-fast demo``: the paper's effect on a model small enough to watch."""

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npo_fast import tables
from npo_fast.cli.console import Output
from npo_fast.validation import check_output

if TYPE_CHECKING:
    from npo_fast.experiments.demo.experiment import Demo, Outcome

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """The options of ``npo-fast demo``."""

    output: Path = Path("npo-fast-demo")
    """Folder for the models, evaluation logs, step records and the plot."""
    overwrite: bool = False
    """Replace the demo that is in the output folder."""
    seed: int = 0
    """One seed makes one world, one model and one result."""


def run(command: Command) -> Output:
    """Runs the demo; returns what each method forgot and kept."""
    folder = command.output
    check_output(folder, "result.json", "a demo", command.overwrite, alone=True)
    if folder.exists():
        shutil.rmtree(folder)
    started = time.perf_counter()
    logger.info("loading PyTorch and transformers")
    from npo_fast.experiments.demo.experiment import Demo, DemoSettings

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
    original = outcomes["original"].last.model_utility or 1.0

    def row(name: str, outcome: "Outcome") -> list[str]:
        peak, last = outcome.peak, outcome.last
        at = f" (epoch {peak.epoch})" if outcome.path else ""
        return [
            name,
            tables.number(peak.forget_quality) + at,
            _utility(peak.model_utility, original),
            tables.number(last.forget_quality),
            _utility(last.model_utility, original),
            outcome.verdict.outcome,
        ]

    header = (
        "model", "forget quality: peak", "utility there", "at the end", "utility then", "verdict"
    )  # fmt: skip
    lines = [tables.plain((row(name, outcome) for name, outcome in outcomes.items()), header)]
    lines.append(
        "\nforget quality: p-value against the model that was never taught (above 0.05: no "
        "difference seen)\nutility: of what was to be kept, and share of the original's"
    )
    for which, record in demo.shown.items():
        lines += ["", f"{which}: {record.question}", f"  {'truth':<10}{record.answer}"]
        lines += [f"  {name:<10}{outcome.answers[which]}" for name, outcome in outcomes.items()]
    lines.append(f"\n{time_s:.0f} s; models, logs and plot are in {demo.folder}")
    return "\n".join(lines)


def _utility(value: float | None, original: float) -> str:
    return "" if value is None else f"{value:.3f} ({value / original:.0%})"
