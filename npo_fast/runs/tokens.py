"""The tokenised data of a run, before any weight is loaded."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from npo_fast.data import Record, Template, TokenizedExample, data_fingerprint
from npo_fast.distributed import world_size
from npo_fast.errors import UserError
from npo_fast.methods import Term, schedule_steps
from npo_fast.trainer.optimizers import check_optimizer
from npo_fast.trainer.order import check_step_in_backward, primary_sources, steps_per_epoch
from npo_fast.trainer.settings import TrainSettings, check_world_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedData:
    """Tokenised examples by source, and the number of steps that they make."""

    template: Template
    sources: dict[str, list[TokenizedExample]]
    truncated: dict[str, int]  # source -> examples that were cut to the template's max_length
    steps: int

    def metadata(self) -> dict[str, Any]:
        """Template, sizes and fingerprints of the data, as ``run.json`` holds them."""
        data = {
            name: {
                "examples": len(examples),
                "tokens": sum(len(example.input_ids) for example in examples),
                "answer_tokens": sum(example.answer_length for example in examples),
                "truncated": self.truncated[name],
                "sha256": data_fingerprint(examples),
            }
            for name, examples in self.sources.items()
        }
        return {"template": self.template.name, "data": data, "steps": self.steps}


def tokenize_sources(
    records: Mapping[str, list[Record]],  # source -> its records
    names: Mapping[str, str],  # source -> what the user calls it
    template: Template,
    terms: tuple[Term, ...],
    training: TrainSettings,
) -> TokenizedData:
    """Tokenises every source, once, and counts the steps.

    Raises:
        UserError: settings, records and tokenizer that do not fit together.
    """
    check_world_size(terms, training, world_size())
    check_optimizer(training.optimizer)
    step_terms = schedule_steps(terms, training.schedule)
    sources, truncated = {}, {}
    for source, rows in records.items():
        try:
            sources[source], truncated[source] = template.encode_all(rows)
        except UserError as error:
            raise UserError(f"{source} ({names[source]}): {error}") from error
        cut = f", {truncated[source]} cut to {template.max_length}" if truncated[source] else ""
        tokens = sum(len(example.input_ids) for example in sources[source])
        logger.info(f"{source}: {len(rows)} records, {tokens} tokens{cut} ({names[source]})")
    if training.step_in_backward:
        check_step_in_backward(sources, terms, training)
    (primary, *_) = primary_sources({s: sources[s] for term in terms for s in term.reads})
    per_epoch = steps_per_epoch(len(sources[primary]), training.batch_size)
    steps = training.epochs * per_epoch * len(step_terms)
    logger.info(f"{training.epochs} epochs of {training.batch_size} a step: {steps} steps")
    return TokenizedData(template, sources, truncated, steps)


def describe_run(verb: str, settings: Mapping[str, Any], tokens: TokenizedData) -> dict[str, Any]:
    """What makes two runs the same, as far as it is known before a weight is loaded.

    Args:
        settings: dataclasses by group.
    """
    groups = {name: asdict(group) for name, group in settings.items()}
    return {"command": verb, "settings": groups, **tokens.metadata()}
