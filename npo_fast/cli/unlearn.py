"""``npo-fast unlearn``: makes a model forget one set of records and keep another."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from npo_fast import tables
from npo_fast.cli.console import Output
from npo_fast.cli.help import next_commands, report_command
from npo_fast.metrics.measures import value_of
from npo_fast.metrics.verdict import Verdict
from npo_fast.reports.runs import SAMPLE_HEADER, load_run, sample_rows
from npo_fast.runs.options import (
    EvaluationOptions,
    MethodOptions,
    ModelOptions,
    ReportOptions,
    RunOptions,
    UnlearnData,
)
from npo_fast.trainer.settings import TrainSettings


@dataclass(frozen=True)
class Command:
    """Options of npo-fast unlearn, by group."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: UnlearnData = field(default_factory=UnlearnData)
    method: MethodOptions = field(default_factory=MethodOptions)
    training: TrainSettings = field(default_factory=TrainSettings)
    report: ReportOptions = field(default_factory=ReportOptions)
    watch: EvaluationOptions = field(default_factory=EvaluationOptions)
    run: RunOptions = field(default_factory=RunOptions)


def run(command: Command) -> Output:
    """Unlearns; returns probability, ROUGE-L and answers before and after."""
    from npo_fast.runs import unlearn

    made = unlearn(
        command.model.model, **vars(command.data), method=command.method, loading=command.model,
        training=command.training, report=command.report, evaluation=command.watch,
        run=command.run,
    )  # fmt: skip
    metadata = made.metadata
    if command.run.dry_run:
        return Output({"dry_run": True, **metadata}, "dry run: all is well")
    evaluation = load_run(made.folder, made.folder.name).evaluate_command()
    parts = [
        _text(metadata),
        f"verdict: {Verdict.of(metadata['verdict'])}",
        f"finished: {_chosen(command.watch, metadata)} {made.folder / 'model'}",
        *next_commands(evaluation, report_command(made.folder)),
    ]
    return Output({"output": str(made.folder), **metadata}, "\n".join(filter(None, parts)))


def _chosen(options: EvaluationOptions, metadata: Mapping[str, Any]) -> str:
    measure = options.keep_best
    if measure is None:
        return "the model is in"
    if "best_lost" in metadata:
        return "the best model was lost; the model after the last step is in"
    if "best" not in metadata:
        return (
            f"no evaluation kept {options.min_utility:.0%} of the utility; the model after the "
            "last step is in"
        )
    best = metadata["best"]
    value = tables.number(value_of(best, measure))
    return f"the model of step {best['step']}, the best by {measure} ({value}), is in"


def _text(metadata: Mapping[str, Any]) -> str:
    """The report before and after as a table, with the first answer of each set."""
    before, after = metadata.get("before", {}), metadata.get("after", {})
    if not after:
        return ""
    lines = ["", tables.plain(sample_rows(metadata), SAMPLE_HEADER)]
    for name in before:
        old, new = before[name]["answers"][0], after[name]["answers"][0]
        lines += [
            "",
            f"{name}: {old['question']}",
            f"  truth   {old['truth']}",
            f"  before  {old['answer']}",
            f"  after   {new['answer']}",
        ]
    return "\n".join([*lines, ""])
