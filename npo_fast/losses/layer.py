"""Losses of the hidden states that a decoder layer hands on: no later layer and no head runs.

With ``h_n`` the state of a token, (D,), before any final norm, and ``t_n`` its target:

    L_i = mean over the tokens n of sequence i of mean_d (h_nd - t_nd)^2

Source: RMU, arXiv 2403.03218; its formula sums over d, its code takes the mean over d, as here.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from npo_fast.errors import UserError
from npo_fast.kernels.transform import LARGEST
from npo_fast.ops import segment_sum


@dataclass(frozen=True)
class LayerLoss:
    """Base: the mean squared distance from a target, at the decoder layer ``layer``.

    Layers count from 0, as in ``model.layers[7]``; None is the last of
    the first quarter.
    """

    layer: int | None = None
    reference: ClassVar[Literal["hidden"] | None] = None

    def __post_init__(self) -> None:
        """Raises UserError for what is no layer."""
        if self.layer is not None and not (isinstance(self.layer, int) and self.layer >= 0):
            raise UserError(f"layer must be 0 or more, got {self.layer!r}: layers count from 0")

    def __call__(
        self,
        states: Tensor,  # (n, D)
        cu_seqlens: Tensor,  # (s + 1,)
        target: Tensor,  # (n, D) or (D,)
    ) -> Tensor:  # (s,)
        """Returns L of each sequence; 0 where it has no token. In fp32 or wider."""
        dtype = torch.promote_types(states.dtype, torch.float32)
        distance = (states.to(dtype) - target.to(dtype)).square().mean(dim=-1)
        tokens = cu_seqlens.diff().clamp(min=1).to(states.device)
        return segment_sum(distance, cu_seqlens) / tokens


@dataclass(frozen=True)
class RMU(LayerLoss):
    """Steers states to ``steering * u``, with u a random direction of length 1.

    ``u`` has entries drawn from [0, 1) by ``seed``, as in the papers' code; a run sets its own.
    """

    steering: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for what is no layer, or a coefficient that is not finite."""
        super().__post_init__()
        if not abs(self.steering) <= LARGEST:
            raise UserError(f"steering must be finite, got {self.steering}")

    def target(self, width: int) -> Tensor:  # (D,) fp32, on the CPU
        """Returns ``steering * u``."""
        entries = torch.rand(width, generator=torch.Generator("cpu").manual_seed(self.seed))
        return self.steering * entries / entries.norm()


@dataclass(frozen=True)
class HeldStates(LayerLoss):
    """Holds states where the model before training has them: RMU's retain term."""

    reference: ClassVar[Literal["hidden"]] = "hidden"
