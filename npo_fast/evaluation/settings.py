"""Settings of an evaluation."""

from dataclasses import dataclass

from npo_fast.metrics.memorization import Conventions
from npo_fast.validation import PositiveInt


@dataclass(frozen=True)
class EvaluationSettings(Conventions):
    """How to evaluate: speed, the length of answers, conventions. Losses do not depend on it."""

    micro_batch_tokens: PositiveInt = 4096
    """Tokens that go through the model at a time."""
    generation_batch: PositiveInt = 32
    """Questions answered at a time."""
    max_new_tokens: PositiveInt = 128
    """Longest answer."""
    generate: bool = True
    """Answer greedily, for ROUGE; without it the losses alone are measured."""
    paraphrased_questions: bool = False
    """Ask each paraphrased_question too: is one wording forgotten, or the fact?"""
    gradient_norms: bool = False
    """Gradient norm of each forget and holdout answer, for a membership attack (slow)."""
