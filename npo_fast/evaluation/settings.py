"""Settings of an evaluation."""

from dataclasses import dataclass

from npo_fast.errors import UserError


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate: speed and the length of answers. Losses do not depend on it."""

    micro_batch_tokens: int = 4096
    """Tokens that go through the model at a time."""
    generation_batch: int = 32
    """Questions answered at a time."""
    max_new_tokens: int = 128
    """Longest answer."""
    generate: bool = True
    """Answer greedily, for ROUGE; without it the losses alone are measured."""

    def __post_init__(self) -> None:
        for name in ("micro_batch_tokens", "generation_batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
