"""Losses that compare the distribution over the vocabulary with a reference's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from npo_fast.errors import UserError
from npo_fast.kernels.transform import LARGEST
from npo_fast.ops.linear_kl import linear_kl


@dataclass(frozen=True)
class KL:
    """Divergence from the reference, summed over rows: ``KL(reference || model)``.

    ``demotion`` lowers the reference's logit of each label by so many nats: self-distillation
    towards a reference with less probable labels (UNDIAL, arXiv 2402.10052; its cross-entropy
    differs from this by a constant).
    """

    demotion: float = 0.0
    reference: ClassVar[Literal["hidden"]] = "hidden"

    def __post_init__(self) -> None:
        if not 0 <= self.demotion <= LARGEST:
            raise UserError(
                f"demotion (gamma) must be 0 or more and finite, got {self.demotion} (the range is "
                f"0 to {LARGEST:g})"
            )

    def __call__(
        self,
        hidden: Tensor,  # (n, D)
        head: Mapping[str, Any],  # weight, bias and the fields of HeadTransform
        ref_hidden: Tensor,  # (n, D')
        ref_head: Mapping[str, Any],  # the same of the reference, as ref_weight, …
        labels: Tensor | None = None,  # (n,), to demote
    ) -> Tensor:  # scalar
        """Returns the sum of divergences; differentiable in ``hidden`` and the head's tensors."""
        return linear_kl(
            hidden, ref_hidden=ref_hidden, labels=labels, demotion=self.demotion,
            reduction="sum", **head, **ref_head,
        )  # fmt: skip
