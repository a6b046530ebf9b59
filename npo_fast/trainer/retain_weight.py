"""``--keep-utility``: a constraint on what is kept, and the retain coefficient that it asks for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from npo_fast.data import Sources
from npo_fast.errors import UserError
from npo_fast.losses import LayerLoss
from npo_fast.methods import Schedule, Term

SMOOTHING = 0.5  # of the newest step, in the mean over steps
PROPORTIONAL, INTEGRAL = 4.0, 0.05  # gains, in the logarithm of the coefficient
RANGE = math.log(1000)  # either way from where the coefficient starts


class RetainWeight:
    """The retain coefficient of each step, so that retain data keep a share of their probability.

    The constraint is on the probability of a retain answer, per token: its geometric mean is to be
    at least ``share`` of that of the model as it was. With ``l`` the log-prob of a token,

        lost_t = mean over the retain tokens of step t of (l before - l now)
        x_t    = mean over steps of lost / -ln(share) - 1, within -1 and 1
        lambda = start * exp(4 (x_t + 1) + I_t),  I_(t + 1) = I_t + 0.05 x_t

    Dual ascent raises a multiplier while its constraint is violated (PDU, arXiv 2506.05314); here
    it does so in the logarithm, since the right coefficient differs by orders of magnitude from
    method to method, and has a proportional part, since steps are few. Each step compares its own
    sequences with themselves, which leaves none of the noise of which ones they are.
    """

    def __init__(
        self, share: float, terms: Sequence[Term], references: Mapping[str, Tensor | list[Tensor]]
    ) -> None:
        self.tolerance = -math.log(share)
        self.start = next(term.coefficient for term in terms if term.source == "retain")
        self.before = [float(log_prob.sum()) for log_prob in references["retain"]]
        self.lost = self.integral = 0.0

    @property
    def kept(self) -> float:
        """Share of the probability that is left, in the mean over the last steps."""
        return math.exp(-self.lost)

    @property
    def excess(self) -> float:
        """How far the loss is beyond the tolerance, as a multiple of it."""
        return min(1.0, max(-1.0, self.lost / self.tolerance - 1))

    @property
    def coefficient(self) -> float:
        """Of the retain term in the next step."""
        logarithm = PROPORTIONAL * (self.excess + 1) + self.integral
        return self.start * math.exp(min(RANGE, max(-RANGE, logarithm)))

    def weigh(self, terms: Sequence[Term]) -> tuple[Term, ...]:
        """The terms, those on retain data with ``coefficient``."""
        scale = self.coefficient / self.start
        return tuple(
            replace(term, coefficient=scale * term.coefficient) if term.source == "retain" else term
            for term in terms
        )

    def update(self, batch: Sources, log_probs: Mapping[str, float]) -> None:
        """Takes what a step measured: the mean log-prob of a sequence by source."""
        retain = batch["retain"]
        before = sum(self.before[example.index] for example in retain)
        tokens = max(1, sum(example.answer_length for example in retain))
        lost = (before - len(retain) * log_probs["retain"]) / tokens
        self.lost += SMOOTHING * (lost - self.lost)
        self.integral = min(RANGE, max(-RANGE, self.integral + INTEGRAL * self.excess))

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint holds of it."""
        return {"lost": self.lost, "integral": self.integral}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores what ``state_dict`` returned."""
        self.lost, self.integral = state["lost"], state["integral"]


def check_keep_utility(terms: Sequence[Term], schedule: Schedule) -> None:
    """Raises ``UserError`` where no term can be weighed against another."""
    retain = [term for term in terms if term.source == "retain"]
    if not retain or len(retain) == len(terms):
        raise UserError(
            "--keep-utility weighs a retain term against those that forget: use a method with +RT "
            "or +KL"
        )
    if any(isinstance(term.loss, LayerLoss) for term in retain):
        raise UserError(
            "--keep-utility reads the probability of retain answers, and this method stops at a "
            "decoder layer: use a method with +RT or +KL"
        )
    if schedule == "alternating":
        raise UserError(
            "--keep-utility weighs the terms of one step against each other, and --schedule "
            "alternating makes steps of one term: use --schedule summed"
        )
    if not all(term.coefficient > 0 for term in retain):
        raise UserError(
            "--keep-utility multiplies the retain coefficient, and cannot start from 0: give a "
            "positive one, or leave it out"
        )
