"""Relearning: fine-tuning on a part of what was forgotten. Source: arXiv 2406.13356."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from npo_fast.data import Record, TokenizedExample
from npo_fast.errors import UserError
from npo_fast.methods import FINETUNE
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.weights import restored
from npo_fast.trainer.loop import train
from npo_fast.trainer.order import permutation
from npo_fast.trainer.settings import StepRecord, TrainSettings


@dataclass(frozen=True)
class Split:
    """Rows of the forget set: those that relearning trains on, and those that are measured."""

    seen: list[int]
    rest: list[int]

    @classmethod
    def of(cls, records: Sequence[Record], share: float, seed: int) -> "Split":
        """Draws ``share`` of the rows to be seen, at least one; a share of 0 leaves all to measure.

        Answers of one conversation stay together.

        Raises:
            UserError: there is a single record or conversation to split.
        """
        groups: list[list[int]] = []
        for i, record in enumerate(records):
            earlier = records[i - 1]
            said = (*earlier.messages, ("assistant", earlier.answer))
            if i and earlier.messages and record.messages[: len(said)] == said:
                groups[-1].append(i)
            else:
                groups.append([i])
        if share > 0 and len(groups) < 2:
            raise UserError(
                "relearning takes at least 2 forget records, a part and a rest: give a text as "
                "several files or lines, or leave it out with --attacks quantize"
            )
        seen = min(len(groups) - 1, max(1, round(share * len(groups)))) if share > 0 else 0
        order = permutation(len(groups), f"{seed}/relearn")
        drawn = (
            [i for group in part for i in groups[group]] for part in (order[:seen], order[seen:])
        )
        return cls(*map(sorted, drawn))


@contextmanager
def relearned(
    lm: CausalLM,
    examples: list[TokenizedExample],
    training: TrainSettings,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> Iterator[None]:
    """Inside, ``lm`` has been fine-tuned on forget examples; afterwards it is what it was."""
    was_training, recomputed = lm.model.training, lm.recomputes_activations
    try:
        with restored([p for p in lm.model.parameters() if p.requires_grad]):
            for record in train(lm, {"train": examples}, FINETUNE, training):
                on_step(record)
            yield
    finally:
        lm.model.train(was_training)
        if training.gradient_checkpointing and not recomputed:
            lm.keep_activations()
