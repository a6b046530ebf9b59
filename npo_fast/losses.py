"""Unlearning losses: one value a sequence from the log-probs of its tokens.

With ``l_i`` the log-probability of sequence i (sum over its tokens), ``r_i = l_i - l_i(reference)``
and ``|y_i|`` its length, a loss is a frozen dataclass that maps token log-probs to ``L_i``. Its
derivative in the token log-probs is all that the fused backward pass needs, so a new loss is the
few lines of its formula. Smaller is better for the optimiser: minimising a forget loss must lower
``l_i``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast.ops import Reference, linear_sequence_loss, segment_sum


@dataclass(frozen=True)
class GA:
    """Gradient ascent: ``L_i = l_i``.

    With ``reduction="token_mean"`` the negated cross-entropy of Hugging Face (the GA of TOFU and
    of the NPO paper); with ``"mean"`` the limit of NPO as beta -> 0, up to a constant.
    """

    reference: ClassVar[Reference] = None
    group: ClassVar[int] = 1

    def __call__(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None = None
    ) -> Tensor:
        return segment_sum(log_probs, cu_seqlens)


@dataclass(frozen=True)
class NLL:
    """Negative log-likelihood: ``L_i = -l_i``, for retain data, refusals and fine-tuning.

    With ``reduction="token_mean"`` the loss that Hugging Face models report.
    """

    reference: ClassVar[Reference] = None
    group: ClassVar[int] = 1

    def __call__(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None = None
    ) -> Tensor:
        return -segment_sum(log_probs, cu_seqlens)


@dataclass(frozen=True)
class NPO:
    """Negative preference optimisation: ``L_i = -(2 / beta) * logsigmoid(-beta * r_i)``.

    ``dL_i / dl_i = 2 * sigmoid(beta * r_i)``: 1 at the start, tending to 0 as the sequence is
    forgotten, which is what keeps the model from collapsing. Source: arXiv 2404.05868, eq. 3.
    """

    beta: float = 0.1
    reference: ClassVar[Reference] = "sequence"
    group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _positive(self, "beta")

    def __call__(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None
    ) -> Tensor:
        assert ref_log_probs is not None
        r = segment_sum(log_probs, cu_seqlens) - ref_log_probs
        return -(2 / self.beta) * F.logsigmoid(-self.beta * r)

    def value_and_weight(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.npo_fast.npo_head(log_probs, cu_seqlens, ref_log_probs, self.beta)


@dataclass(frozen=True)
class SimNPO:
    """Reference-free NPO: ``L_i = -(2 / beta) * logsigmoid(beta * (-l_i / |y_i| - delta))``.

    Source: arXiv 2410.07163, eq. 4 (its gamma is ``beta * delta``).
    """

    beta: float = 2.5
    delta: float = 0.0
    reference: ClassVar[Reference] = None
    group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _positive(self, "beta")

    def __call__(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None = None
    ) -> Tensor:
        tokens = cu_seqlens.diff().to(log_probs.device).clamp(min=1)
        nll = -segment_sum(log_probs, cu_seqlens) / tokens
        return -(2 / self.beta) * F.logsigmoid(self.beta * (nll - self.delta))


def npo_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    ref_log_probs: Tensor,  # (S,)
    beta: float = 0.1,
) -> Tensor:
    """Mean NPO loss of S sequences: ``mean_i -(2 / beta) * logsigmoid(-beta * (l_i - ref_i))``.

    ``linear_sequence_loss`` with ``NPO(beta)``; see there for shapes, dtypes and errors.
    """
    loss, _ = linear_sequence_loss(
        hidden, weight, labels, cu_seqlens, NPO(beta), ref_log_probs=ref_log_probs
    )
    return loss


def _positive(loss: object, field: str) -> None:
    value = getattr(loss, field)
    if not value > 0 or value == torch.inf:
        raise ValueError(f"{type(loss).__name__}: {field} must be positive and finite, got {value}")
