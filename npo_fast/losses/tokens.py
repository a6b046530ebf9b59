"""Gradient ascent with a weight a token: ``L_i = sum_n w_n l_n``, no gradient through ``w_n``.

With ``p_n = exp(l_n)`` the probability of a token. The papers average over tokens:
``reduction="token_mean"``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from npo_fast.losses.base import OfTokens
from npo_fast.ops import Reference


@dataclass(frozen=True)
class TNPO(OfTokens):
    """NPO on tokens: ``w = 2 p^beta / (p^beta + p_ref^beta)``.

    Needs the reference's log-prob of every token. Source: arXiv 2502.19301.
    """

    beta: float = 0.1
    reference: ClassVar[Reference] = "token"

    def weight(self, log_probs: Tensor) -> Tensor:  # (n,) log-ratios
        return 2 * torch.sigmoid(self.beta * log_probs)


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
        return torch.exp(self.beta1 * log_probs) * _one_minus_p(log_probs) ** self.beta2


@dataclass(frozen=True)
class CEU(OfTokens):
    """CE-U: ``w = p / (1 - p)``.

    This is the gradient of the cross-entropy with the model's own distribution without the label.
    The gradient in the logits stays bounded, ``w * (1 - p) = p``, while w itself grows without
    limit as p -> 1. ``1 - p`` may round to 0 there, an infinite weight on a zero gradient, so it is
    clamped to 8 units of rounding (1e-6 in fp32). Source: arXiv 2503.01224.
    """

    def weight(self, log_probs: Tensor) -> Tensor:
        smallest = 8 * torch.finfo(log_probs.dtype).eps
        return torch.exp(log_probs) / _one_minus_p(log_probs).clamp(min=smallest)


def _one_minus_p(log_probs: Tensor) -> Tensor:
    return -torch.expm1(log_probs)  # 1 - exp(l) would cancel near p = 1
