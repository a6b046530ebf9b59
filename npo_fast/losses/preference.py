"""Losses that compare the forget answers with other answers to the same questions."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from npo_fast.losses.base import OfSequence, check_finite, check_positive, log_sigmoid_penalty
from npo_fast.ops import Reference


@dataclass(frozen=True)
class DPO(OfSequence):
    """Direct preference optimisation: ``L = -(2 / beta) * logsigmoid(beta * (r_w - r_l))``.

    Sequences come in pairs: 2i is the preferred answer w (a refusal, or an alternative answer in
    AltPO), 2i + 1 the answer l to forget. One value a pair: "mean" is over pairs.

    Source: arXiv 2404.05868, eq. 2, with the factor 2 that it gives NPO; AltPO: arXiv 2409.13474.
    """

    beta: float = 0.1
    reference: ClassVar[Reference] = "sequence"
    group: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_positive(self, "beta")

    def value_and_slope(
        self, log_prob: Tensor, tokens: Tensor, ref: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert ref is not None
        r = log_prob - ref
        values, slope = log_sigmoid_penalty(self.beta * (r[1::2] - r[::2]), self.beta)
        return values, torch.stack([-slope, slope], dim=1).flatten()


@dataclass(frozen=True)
class KTO(OfSequence):
    """Kahneman-Tversky optimisation: ``L_i = 1 - (2 / beta) * logsigmoid(z - beta * r_i)``.

    ``z`` is the mean of r over refusals to the batch's questions, without gradient: a number that
    the caller computes in one forward pass, so that the forget sequences may come in micro-batches.
    Where it must stay a tensor, add ``z / beta`` to ``ref_log_probs`` instead: that is the same
    loss.

    Source: arXiv 2402.01306 in the form of arXiv 2404.05868.
    """

    beta: float = 0.1
    z: float = 0.0
    reference: ClassVar[Reference] = "sequence"

    def __post_init__(self) -> None:
        check_positive(self, "beta")
        check_finite(self, ["z"])

    def value_and_slope(
        self, log_prob: Tensor, tokens: Tensor, ref: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert ref is not None
        values, slope = log_sigmoid_penalty(self.beta * (log_prob - ref) - self.z, self.beta)
        return 1 + values, slope
