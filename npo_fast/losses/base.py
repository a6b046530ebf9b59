"""Base classes of the losses: a formula written once gives the values and their derivative."""

import math
from abc import ABC, abstractmethod
from numbers import Real
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast.errors import UserError
from npo_fast.kernels.transform import LARGEST
from npo_fast.ops import Reference, segment_sum


class _Loss(ABC):
    """A dataclass of coefficients that follows ``npo_fast.ops.SequenceLoss``."""

    reference: ClassVar[Reference] = None
    group: ClassVar[int] = 1
    least: ClassVar[float] = -math.inf  # of every coefficient

    def __post_init__(self) -> None:
        """Raises UserError where a coefficient makes no sense; beta must be positive."""
        for name, value in vars(self).items():
            if not isinstance(value, Real):
                cure = "; take its .item()" if isinstance(value, Tensor) else ""
                raise UserError(
                    f"{type(self).__name__}: {name} must be a number, got {value!r}{cure}"
                )
            least = max(self.least, -LARGEST)
            rule = "finite" if self.least == -math.inf else f"finite and at least {self.least:g}"
            if name == "beta":
                least, rule = 1 / LARGEST, "positive and finite"
            if not least <= float(value) <= LARGEST:
                raise UserError(
                    f"{type(self).__name__}: {name} must be {rule}, got {value} (the range is "
                    f"{least:g} to {LARGEST:g})"
                )

    def __call__(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None = None
    ) -> Tensor:
        return self._evaluate(log_probs, cu_seqlens, ref_log_probs)[0]

    def value_and_weight(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns values (s / group,), sequence log-probs (s,) and the derivative (n,)."""
        return self._evaluate(log_probs, cu_seqlens, ref_log_probs)

    @abstractmethod
    def _evaluate(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def relative(self, log_probs: Tensor, ref_log_probs: Tensor | None) -> Tensor:
        """Returns log-probs minus those of the reference, where the loss has one."""
        if self.reference is None:
            return log_probs
        assert ref_log_probs is not None
        return log_probs - ref_log_probs.to(log_probs.dtype)


class OfSequence(_Loss):
    """Base of losses of sequence log-probs ``l_i``: a subclass gives L and its slope ``dL / dl_i``.

    Instances are called with token log-probs (n,), ``cu_seqlens`` (s + 1,) and the reference's
    log-probs, and return (s / group,) values.
    """

    @abstractmethod
    def value_and_slope(
        self,
        r: Tensor,  # (s,) log-probs of whole sequences, minus the reference's if there is one
        tokens: Tensor,  # (s,) their lengths
    ) -> tuple[Tensor, Tensor]:  # (s / group,) values, (s,) slopes
        """Returns the loss values and their derivative in ``r``."""

    def _evaluate(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_prob = segment_sum(log_probs, cu_seqlens)
        tokens = cu_seqlens.diff().to(log_probs.device)
        values, slope = self.value_and_slope(self.relative(log_prob, ref_log_probs), tokens)
        return values, log_prob, slope.repeat_interleave(tokens, output_size=len(log_probs))


class OfTokens(_Loss):
    """Base of losses ``L_i = sum_n w_n l_n`` over the tokens of a sequence: a subclass gives w.

    No gradient flows through ``w``. Where w is 0 the term is 0, for a log-prob of -inf too: the
    limit of ``p^beta log p``.
    """

    @abstractmethod
    def weight(
        self,
        log_probs: Tensor,  # (n,) without gradient, minus the reference's if there is one
    ) -> Tensor:  # (n,)
        """Returns the weight of each token."""

    def _evaluate(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.weight(self.relative(log_probs.detach(), ref_log_probs))
        terms = torch.where(weight == 0, 0.0, weight * log_probs)
        return segment_sum(terms, cu_seqlens), segment_sum(log_probs, cu_seqlens), weight


def log_sigmoid_penalty(
    x: Tensor,  # beta * (a log-ratio)
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Returns ``-(2 / beta) * logsigmoid(-x)`` and its derivative in x / beta, 2 sigmoid(x)."""
    return -(2 / beta) * F.logsigmoid(-x), 2 * torch.sigmoid(x)
