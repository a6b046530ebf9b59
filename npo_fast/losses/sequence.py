"""Losses whose value for a sequence depends on that sequence alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from npo_fast.losses.base import OfSequence, check_finite, check_positive, log_sigmoid_penalty
from npo_fast.ops import Reference, linear_sequence_loss


@dataclass(frozen=True)
class GA(OfSequence):
    """Gradient ascent: ``L_i = l_i``.

    With ``reduction="token_mean"`` the negated cross-entropy of Hugging Face (the GA of TOFU and
    of the NPO paper); with ``"mean"`` the limit of NPO as beta -> 0, up to a constant.
    """

    def value_and_slope(
        self, log_prob: Tensor, tokens: Tensor, ref: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return log_prob, torch.ones_like(log_prob)


@dataclass(frozen=True)
class NLL(OfSequence):
    """Negative log-likelihood: ``L_i = -l_i``, for retain data, refusals and fine-tuning.

    With ``reduction="token_mean"`` the loss that Hugging Face models report.
    """

    def value_and_slope(
        self, log_prob: Tensor, tokens: Tensor, ref: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return -log_prob, -torch.ones_like(log_prob)


@dataclass(frozen=True)
class NPO(OfSequence):
    """Negative preference optimisation: ``L_i = -(2 / beta) * logsigmoid(-beta * r_i)``.

    ``dL_i / dl_i = 2 * sigmoid(beta * r_i)`` is 1 at the start and tends to 0 as the sequence is
    forgotten; this keeps the model from collapsing. Source: arXiv 2404.05868, eq. 3.
    """

    beta: float = 0.1
    reference: ClassVar[Reference] = "sequence"

    def __post_init__(self) -> None:
        check_positive(self, "beta")

    def value_and_slope(
        self, log_prob: Tensor, tokens: Tensor, ref: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert ref is not None
        return log_sigmoid_penalty(self.beta * (log_prob - ref), self.beta)

    def value_and_weight(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the same as the base class, in one launch on a GPU."""
        return torch.ops.npo_fast.npo_head(log_probs, cu_seqlens, ref_log_probs, self.beta)


@dataclass(frozen=True)
class SimNPO(OfSequence):
    """Reference-free NPO: ``L_i = -(2 / beta) * logsigmoid(beta * (-l_i / |y_i| - delta))``.

    Source: arXiv 2410.07163, eq. 4 (its gamma is ``beta * delta``).
    """

    beta: float = 2.5
    delta: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "beta")
        check_finite(self, ["delta"])

    def value_and_slope(
        self, log_prob: Tensor, tokens: Tensor, ref: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        length = tokens.clamp(min=1)
        x = self.beta * (log_prob / length + self.delta)
        values, slope = log_sigmoid_penalty(x, self.beta)
        return values, slope / length


def npo_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    ref_log_probs: Tensor,  # (S,)
    beta: float = 0.1,
) -> Tensor:
    """Returns the mean NPO loss: ``mean_i -(2 / beta) * logsigmoid(-beta * (l_i - ref_i))``.

    ``linear_sequence_loss`` with ``NPO(beta)``; see there for shapes, dtypes and errors.
    """
    loss, _ = linear_sequence_loss(
        hidden, weight, labels, cu_seqlens, NPO(beta), ref_log_probs=ref_log_probs
    )
    return loss
