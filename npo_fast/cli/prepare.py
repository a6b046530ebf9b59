"""What a run of training has before any weight is loaded: its tokens, its steps, its identity."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npo_fast.cli.console import say
from npo_fast.data import Record, Template, TokenizedExample, data_fingerprint
from npo_fast.distributed import world_size
from npo_fast.errors import UserError
from npo_fast.methods import Term, schedule_steps
from npo_fast.trainer.optimizers import check_optimizer
from npo_fast.trainer.order import check_step_in_backward, primary_sources, steps_per_epoch
from npo_fast.trainer.settings import TrainSettings, check_world_size

if TYPE_CHECKING:
    from npo_fast.cli.training import ModelOptions


@dataclass(frozen=True)
class Prepared:
    """Tokenised data and the steps it makes, before any weight is loaded."""

    template: Template
    sources: dict[str, list[TokenizedExample]]
    truncated: dict[str, int]
    steps: int

    def facts(self) -> dict[str, Any]:

        data = {
            name: {
                "examples": len(sequences),
                "tokens": sum(len(s.input_ids) for s in sequences),
                "answer_tokens": sum(s.answer_length for s in sequences),
                "truncated": self.truncated[name],
                "sha256": data_fingerprint(sequences),
            }
            for name, sequences in self.sources.items()
        }
        return {"template": self.template.name, "data": data, "steps": self.steps}


def prepare(
    options: "ModelOptions",
    training: TrainSettings,
    records: Mapping[str, list[Record]],  # source -> its records
    named: Mapping[str, str],  # source -> what the user knows it as
    terms: tuple[Term, ...],
) -> Prepared:
    """Everything that can fail on the user's side, first."""
    options.check_training()
    check_world_size(terms, training, world_size())
    check_optimizer(training.optimizer)
    each_batch = schedule_steps(terms, training.schedule)
    template = options.load_template()
    sources, truncated = {}, {}
    for source in records:
        name = named[source]
        try:
            sources[source], truncated[source] = template.encode_all(records[source])
        except UserError as error:
            raise UserError(f"{source} ({name}): {error}") from error
        cut = f", {truncated[source]} cut to {template.max_length}" if truncated[source] else ""
        tokens = sum(len(s.input_ids) for s in sources[source])
        say(f"{source}: {len(sources[source])} records, {tokens} tokens{cut} ({name})")
    if training.step_in_backward:
        check_step_in_backward(sources, terms, training)
    (primary, *_) = primary_sources({s: sources[s] for term in terms for s in term.reads})
    per_epoch = steps_per_epoch(len(sources[primary]), training.batch_size)
    steps = training.epochs * per_epoch * len(each_batch)
    say(f"{training.epochs} epochs of {training.batch_size} a step: {steps} steps")
    return Prepared(template, sources, truncated, steps)


def run_facts(command: Any, verb: str, prepared: Prepared) -> dict[str, Any]:
    """What makes two runs the same run, as far as it is known before a weight is loaded."""
    return {"command": verb, "settings": dataclasses.asdict(command), **prepared.facts()}
