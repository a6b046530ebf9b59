"""``npo-fast finetune``: negative log-likelihood of the answers."""

from dataclasses import dataclass, field

from npo_fast.cli.console import say, show
from npo_fast.cli.prepare import prepare, run_facts
from npo_fast.cli.training import ModelOptions, RunOptions, run_training
from npo_fast.data import load_records
from npo_fast.errors import UserError
from npo_fast.methods import FINETUNE
from npo_fast.trainer.settings import TrainSettings


@dataclass(frozen=True)
class DataOptions:
    """What to teach."""

    train: str = ""
    """A file, or a split of --data; either may end in a slice such as [:160]."""
    data: str | None = None
    """Hub dataset, folder, or file that --train is a split of."""


@dataclass(frozen=True)
class Command:
    model: ModelOptions
    data: DataOptions = field(default_factory=DataOptions)
    training: TrainSettings = field(default_factory=lambda: TrainSettings(epochs=5))
    run: RunOptions = field(default_factory=RunOptions)


def run(command: Command) -> None:
    if not command.data.train and command.data.data is None:
        raise UserError("say what to teach with --train (a file, or a split of --data)")
    command.run.check(command.model)
    records = {"train": load_records(command.data.train, command.data.data)}
    named = {"train": command.data.train}
    prepared = prepare(command.model, command.training, records, named, FINETUNE)
    earlier = command.run.unfinished(run_facts(command, "finetune", prepared))
    if command.run.dry_run:
        show({"dry_run": True, **prepared.facts()}, "dry run: all is well", command.run.json)
        return
    lm = command.model.load_model(earlier)
    facts = run_training(command, "finetune", prepared, lm, FINETUNE, earlier)
    final = facts["final"]
    say()
    show(
        {"output": str(command.run.output), **facts},
        f"loss {final['loss']:.4f} after {final['step']} steps; the model is in "
        f"{command.run.output / 'model'}",
        command.run.json,
    )
