"""``npo-fast attack``: what comes back when an unlearned model is relearned or rounded."""

import json
from dataclasses import dataclass, field

from npo_fast import tables
from npo_fast.attacks.options import AttackOptions
from npo_fast.cli.console import Output
from npo_fast.distributed import is_main_process
from npo_fast.runs.options import RELEARNING, AttackData, ModelOptions
from npo_fast.trainer.settings import TrainSettings


@dataclass(frozen=True)
class Command:
    """Options of npo-fast attack, by group."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: AttackData = field(default_factory=AttackData)
    attack: AttackOptions = field(default_factory=AttackOptions)
    training: TrainSettings = field(default_factory=lambda: RELEARNING)


def run(command: Command) -> Output:
    """Attacks the model; returns the measures by attack."""
    from npo_fast.runs.attacking import SUMMARY, attack

    scores = attack(
        command.model.model, **vars(command.data), loading=command.model, attacks=command.attack,
        training=command.training,
    )  # fmt: skip
    rows = ([name, *(each[name] for each in scores.values())] for name in scores["before"])
    table = tables.plain(rows, ("measure", *scores))
    if not is_main_process():
        return Output({"measures": scores}, table)
    try:
        summary = json.loads((command.data.output / SUMMARY).read_text(encoding="utf-8"))
    except OSError:  # a full disk did not take it
        return Output({"measures": scores}, table, exit_code=1)
    return Output(summary, table)
