"""Gradient ascent with a weight a token: ``L_i = sum_n w_n l_n``, no gradient through ``w_n``.

With ``p_n = exp(l_n)`` the probability of a token. The papers average over tokens:
``reduction="token_mean"``.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from npo_fast.errors import UserError
from npo_fast.losses.base import OfTokens
from npo_fast.ops import Reference, segment_sum
from npo_fast.ops.head import Head
from npo_fast.ops.target_entropy import entropy_without_labels


@dataclass(frozen=True)
class TNPO(OfTokens):
    """NPO on tokens: ``w = 2 p^beta / (p^beta + p_ref^beta + epsilon)``.

    Needs the reference's log-prob of every token. Source: arXiv 2502.19301, whose code takes a beta
    of 4 and an epsilon of 1e-5: no token weighs more than ``2 p^beta / epsilon``. A token without
    probability (p = 0) has no weight, whatever the reference says.
    """

    beta: float = 0.1
    epsilon: float = 0.0
    least: ClassVar[float] = 0.0
    reference: ClassVar[Reference] = "token"

    def weight(self, log_probs: Tensor) -> Tensor:  # (n,) log-ratios
        return 2 * torch.sigmoid(self.beta * log_probs)

    def relative(self, log_probs: Tensor, ref_log_probs: Tensor | None) -> Tensor:
        assert ref_log_probs is not None
        if self.epsilon:  # p_ref^beta + epsilon is the power of a reference that likes more
            ref_log_probs = ref_log_probs.to(log_probs.dtype)
            floor = ref_log_probs.new_tensor(math.log(self.epsilon))
            ref_log_probs = torch.logaddexp(self.beta * ref_log_probs, floor) / self.beta
        r = super().relative(log_probs, ref_log_probs)
        return r.masked_fill(log_probs == -torch.inf, -torch.inf)


@dataclass(frozen=True)
class WGA(OfTokens):
    """Weighted gradient ascent: ``w = p^beta``, so that forgotten tokens have no weight.

    Source: arXiv 2502.19301.
    """

    beta: float = 1.0

    def weight(self, log_probs: Tensor) -> Tensor:
        return torch.exp(self.beta * log_probs)


@dataclass(frozen=True)
class SatImp(OfTokens):
    """Saturation times importance: ``w = p^beta1 * (1 - p)^beta2``. Source: arXiv 2505.11953."""

    beta1: float = 5.0
    beta2: float = 1.0
    least: ClassVar[float] = 0.0

    def weight(self, log_probs: Tensor) -> Tensor:
        if self.beta1 == 0:  # p^0 is 1 at p = 0 too
            return _one_minus_p(log_probs) ** self.beta2
        return torch.exp(self.beta1 * log_probs) * _one_minus_p(log_probs) ** self.beta2


@dataclass(frozen=True)
class CEU(OfTokens):
    """CE-U: ``L_i = -sum_n log(1 - p_n)``, so ``w = p / (1 - p)``.

    This is the cross-entropy with the model's own distribution without the label, as a target that
    no gradient flows through, less the entropy of that target. ``target_entropy`` is the rest; a
    training run logs their sum. The gradient in the logits stays bounded, ``w * (1 - p) = p``,
    while w itself grows without limit as p -> 1. ``1 - p`` may round to 0 there, an infinite weight
    on a zero gradient, so it is clamped to 8 units of rounding (1e-6 in fp32).

    The first ``skip_first`` tokens of a sequence carry no loss (open-unlearning's
    ``ignore_first_n_answer_tokens``). A method divides by the number of the others;
    ``reduction="token_mean"`` counts every token. Source: arXiv 2503.01224.
    """

    skip_first: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.skip_first, int) or self.skip_first < 0:
            raise UserError(
                f"CEU: skip_first must be a whole number, 0 or more, got {self.skip_first}"
            )

    def weight(self, log_probs: Tensor) -> Tensor:
        return torch.exp(log_probs) / _clamped(_one_minus_p(log_probs))

    def target_entropy(
        self,
        head: Head,
        hidden: Tensor,  # (n, D)
        labels: Tensor,  # (n,)
        cu_seqlens: Tensor,  # (s + 1,)
    ) -> Tensor:  # scalar
        """Returns the sum of the targets' entropies, in nats; makes the logits once more."""
        entropy = entropy_without_labels(head, hidden, labels)
        return torch.where(self._carries(hidden, cu_seqlens), entropy, 0).sum()

    def _evaluate(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        carries = self._carries(log_probs, cu_seqlens)
        values = -torch.log(_clamped(_one_minus_p(log_probs))) * carries
        weight = self.weight(log_probs.detach()) * carries
        return segment_sum(values, cu_seqlens), segment_sum(log_probs, cu_seqlens), weight

    def _carries(self, rows: Tensor, cu_seqlens: Tensor) -> Tensor:  # (n,) bool
        """Whether each of these rows carries a loss."""
        first, lengths = cu_seqlens[:-1].to(rows.device), cu_seqlens.diff().to(rows.device)
        starts = first.repeat_interleave(lengths, output_size=len(rows))
        return torch.arange(len(rows), device=rows.device) - starts >= self.skip_first


def _one_minus_p(log_probs: Tensor) -> Tensor:
    return -torch.expm1(log_probs)  # 1 - exp(l) would cancel near p = 1


def _clamped(one_minus_p: Tensor) -> Tensor:
    return one_minus_p.clamp(min=8 * torch.finfo(one_minus_p.dtype).eps)
