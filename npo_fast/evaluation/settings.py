"""Settings of an evaluation."""

from dataclasses import dataclass
from typing import Annotated

from npo_fast.metrics.memorization import Conventions
from npo_fast.validation import Help, PositiveInt


@dataclass(frozen=True)
class EvaluationSettings(Conventions):
    """How to measure: speed, length of answers, conventions."""

    micro_batch_tokens: PositiveInt = 4096
    """Tokens that go through the model at a time."""
    generation_batch: PositiveInt = 32
    """Questions answered at a time."""
    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens."""
    generate: Annotated[bool, Help("Write no answers: faster, but without ROUGE. Losses stay.")] = (
        True
    )
    """Answer greedily, for ROUGE; without it the losses alone are measured."""
    paraphrased_questions: bool = False
    """Also ask each paraphrased_question: is the fact forgotten, or one wording of it?"""
    gradient_norms: bool = False
    """Also measure the gradient norm of each forget and holdout answer, for a membership attack
    (slow)."""
