"""Losses of the log-probs of sequences, or of pairs of them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from npo_fast.errors import UserError
from npo_fast.kernels.transform import TransformOptions
from npo_fast.losses.base import OfSequence, log_sigmoid_penalty
from npo_fast.ops import Reference, linear_sequence_loss, segment_sum


@dataclass(frozen=True)
class GA(OfSequence):
    """Gradient ascent: ``L_i = l_i``.

    With ``reduction="token_mean"`` the negated cross-entropy of Hugging Face (the GA of TOFU and
    of the NPO paper); with ``"mean"`` the limit of NPO as beta -> 0, up to a constant.
    """

    def value_and_slope(self, r: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return r, torch.ones_like(r)


@dataclass(frozen=True)
class NLL(OfSequence):
    """Negative log-likelihood: ``L_i = -l_i``, for retain data, refusals and fine-tuning.

    With ``reduction="token_mean"`` the loss that Hugging Face models report.
    """

    def value_and_slope(self, r: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return -r, -torch.ones_like(r)


@dataclass(frozen=True)
class NPO(OfSequence):
    """Negative preference optimisation: ``L_i = -(2 / beta) * logsigmoid(-beta * r_i)``.

    ``dL_i / dl_i = 2 * sigmoid(beta * r_i)`` is 1 at the start and tends to 0 as the sequence is
    forgotten; this keeps the model from collapsing. Source: arXiv 2404.05868, eq. 3.
    """

    beta: float = 0.1
    reference: ClassVar[Reference] = "sequence"

    def value_and_slope(self, r: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return log_sigmoid_penalty(self.beta * r, self.beta)

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

    def value_and_slope(self, r: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        length = tokens.clamp(min=1)
        x = self.beta * (r / length + self.delta)
        values, slope = log_sigmoid_penalty(x, self.beta)
        return values, slope / length


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

    def value_and_slope(self, r: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
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

    def value_and_slope(self, r: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        values, slope = log_sigmoid_penalty(self.beta * r - self.z, self.beta)
        return 1 + values, slope


@dataclass(frozen=True)
class Averaged:
    """Another loss, of the mean log-prob of a sequence's tokens: ``l_i / |y_i|`` in place of l_i.

    The reference's log-probs are means too. A sequence without a token has log-prob 0.
    """

    loss: OfSequence

    def __post_init__(self) -> None:
        """Raises UserError for a loss that is not one of sequence log-probs."""
        if not isinstance(self.loss, OfSequence):
            raise UserError(
                f"average_log_prob is for losses of sequence log-probs, such as NPO and DPO, and "
                f"{self.loss!r} is not: reduction='token_mean' averages it over tokens"
            )

    @property
    def reference(self) -> Reference:
        """As that of the loss."""
        return self.loss.reference

    @property
    def group(self) -> int:
        """As that of the loss."""
        return self.loss.group

    def __call__(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None = None
    ) -> Tensor:
        return self.value_and_weight(log_probs, cu_seqlens, ref_log_probs)[0]

    def value_and_weight(
        self, log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns values (s / group,), mean log-probs (s,) and the derivative (n,)."""
        tokens = cu_seqlens.diff().to(log_probs.device)
        length = tokens.clamp(min=1)
        mean = segment_sum(log_probs, cu_seqlens) / length
        relative = self.loss.relative(mean, ref_log_probs)
        values, slope = self.loss.value_and_slope(relative, torch.ones_like(tokens))
        weight = (slope / length).repeat_interleave(tokens, output_size=len(log_probs))
        return values, mean, weight


def npo_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    ref_log_probs: Tensor,  # (S,)
    beta: float = 0.1,
    *,
    bias: Tensor | None = None,  # (V,)
    **transform: Unpack[TransformOptions],
) -> Tensor:
    """Returns the mean NPO loss: ``mean_i -(2 / beta) * logsigmoid(-beta * (l_i - ref_i))``.

    ``linear_sequence_loss`` with ``NPO(beta)``; see there for shapes, dtypes and errors.
    """
    loss, _ = linear_sequence_loss(
        hidden, weight, labels, cu_seqlens, NPO(beta),
        ref_log_probs=ref_log_probs, bias=bias, **transform,
    )  # fmt: skip
    return loss
