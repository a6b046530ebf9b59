"""Which attacks to run, and how strong they are."""

from dataclasses import dataclass
from typing import Annotated

from npo_fast.errors import UserError
from npo_fast.metrics.memorization import Memorization
from npo_fast.validation import Bound, Checked, PositiveInt


@dataclass(frozen=True)
class AttackOptions(Checked):
    """The attacks: relearn a part of the forget set, round the weights."""

    attacks: str = "relearn,quantize"
    """Attacks to run: relearn, quantize, or both with a comma in between."""
    relearn_share: Annotated[float, Bound("between 0 and 1", lambda share: 0 < share < 1)] = 0.2
    """Share of the forget set to train on again; the rest is measured."""
    bits: str = "8,4"
    """Bits to round the weights to, separated by commas."""
    group: PositiveInt = 128
    """Neighbouring weights of an output channel that share one scale."""
    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens."""
    memorization: Memorization = "papers"
    """How exact memorization and extraction strength are counted, as in npo-fast evaluate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.names:
            if name not in ("relearn", "quantize"):
                raise UserError(f"unknown attack {name!r}: use relearn, quantize or both")
        if not all(2 <= width <= 8 for width in self.widths):
            raise UserError(f"bits must be whole numbers from 2 to 8, got {self.bits!r}")

    @property
    def names(self) -> list[str]:
        """The attacks, "relearn" or "quantize"."""
        return [name.strip() for name in self.attacks.split(",")]

    @property
    def widths(self) -> list[int]:
        """Bits of a weight, one number a quantization; 0 for what is no number."""
        widths = (width.strip() for width in self.bits.split(","))
        return [int(width) if width.isdecimal() else 0 for width in widths]
