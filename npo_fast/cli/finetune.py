"""``npo-fast finetune``: teaches a model a set of records."""

from dataclasses import dataclass, field

from npo_fast.cli.console import Output
from npo_fast.cli.help import next_commands
from npo_fast.reports.runs import load_run
from npo_fast.runs.options import FINETUNING, FinetuneData, ModelOptions, RunOptions
from npo_fast.tables import counted
from npo_fast.trainer.settings import TrainSettings


@dataclass(frozen=True)
class Command:
    """Options of npo-fast finetune, by group."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: FinetuneData = field(default_factory=FinetuneData)
    training: TrainSettings = field(default_factory=lambda: FINETUNING)
    run: RunOptions = field(default_factory=RunOptions)


def run(command: Command) -> Output:
    """Fine-tunes a model; returns the final loss."""
    from npo_fast.runs import finetune

    made = finetune(
        command.model.model, **vars(command.data), loading=command.model,
        training=command.training, run=command.run,
    )  # fmt: skip
    metadata = made.metadata
    if command.run.dry_run:
        return Output({"dry_run": True, **metadata}, "dry run: all is well")
    final = metadata["final"]
    evaluation = load_run(made.folder, made.folder.name).evaluate_command(forget=command.data.train)
    parts = [
        f"loss {final['loss']:.4f} after {counted(final['step'], 'step')}",
        f"finished: the model is in {made.folder / 'model'}",
        *next_commands(evaluation),
    ]
    return Output({"output": str(made.folder), **metadata}, "\n".join(parts))
