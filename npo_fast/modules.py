"""The fused losses as ``nn.Module``s, called as other fused linear preference losses are.

    loss = FusedLinearNPOLoss(beta=0.1)(lin_weight, hidden, target, bias, ref_log_probs)

A target is *already shifted*: ``target[b, t]`` is the token that ``hidden[b, t]`` predicts, so a
batch of token ids gives ``hidden[:, :-1]`` and ``ids[:, 1:]``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from npo_fast.kernels.transform import TransformOptions
from npo_fast.losses import DPO, GA, NLL, NPO, SimNPO
from npo_fast.ops import Reduction, SequenceLoss, linear_sequence_loss
from npo_fast.ops.checks import check_cu_seqlens


class FusedLinearSequenceLoss(nn.Module):
    """``reduce_i L(log-probs of sequence i)`` for any ``SequenceLoss``, from hidden states.

    Rows without a label are dropped before the head: prompts and padding cost nothing. Selecting
    rows costs a GPU one synchronisation a call; a batch of more than one chunk has a second, for
    the boundaries of its sequences.

    Args:
        loss: ``NPO(beta)`` and siblings, or anything that follows ``SequenceLoss``.
        reduction, chunk_rows, softcap, logit_scale: as in ``linear_sequence_loss``.
        ignore_index: the target of a position without a label.
    """

    def __init__(
        self,
        loss: SequenceLoss,
        *,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        chunk_rows: int | None = None,
        **transform: Unpack[TransformOptions],
    ) -> None:
        super().__init__()
        self.loss, self.transform, self.chunk_rows = loss, transform, chunk_rows
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        hidden: Tensor,  # (B, T, D) or (N, D)
        target: Tensor,  # (B, T) or (N,)
        bias: Tensor | None = None,  # (V,)
        ref_log_probs: Tensor | None = None,  # (B,) or (S,); one a token: as target
        *,
        cu_seqlens: Tensor | None = None,  # (S + 1,)
    ) -> Tensor:  # scalar
        """Returns the loss, differentiable in ``hidden``, ``lin_weight`` and ``bias``.

        Args:
            lin_weight: the LM head, in the dtype of ``hidden``; frozen, its GEMM is not done.
            hidden: a padded batch (B, T, D), one sequence a row, or S sequences end to end (N, D).
            target: shifted labels with ``ignore_index`` where there is none. A sequence without
                any label has log-prob 0: no gradient, and its constant in the mean.
            ref_log_probs: log-prob of each sequence's labels under the reference model, where the
                loss needs it; of each label, in the shape of ``target``, for TNPO.
            cu_seqlens: for flat input: sequence i is rows ``cu_seqlens[i]`` to
                ``cu_seqlens[i + 1]`` of ``hidden``, rows without a label included.

        Raises:
            ValueError: shapes, dtypes, devices, labels or offsets that do not fit together, or a
                missing reference; the message names the shape.
        """
        op = type(self).__name__
        if hidden.dim() not in (2, 3) or target.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{op}: hidden must be (B, T, D) with target (B, T), or (N, D) with target (N,), "
                f"got {tuple(hidden.shape)} and {tuple(target.shape)}"
            )
        if (hidden.dim() == 2) != (cu_seqlens is not None):
            offsets = None if cu_seqlens is None else tuple(cu_seqlens.shape)
            raise ValueError(
                f"{op}: cu_seqlens belongs to flat (N, D) hidden states and to no other, got "
                f"hidden {tuple(hidden.shape)} and cu_seqlens {offsets}"
            )
        keep = target != self.ignore_index
        if self.loss.reference == "token" and ref_log_probs is not None:
            if ref_log_probs.shape != target.shape:
                raise ValueError(
                    f"{op}: {type(self.loss).__name__} needs ref_log_probs in the shape of target, "
                    f"{tuple(target.shape)}, got {tuple(ref_log_probs.shape)}"
                )
            ref_log_probs = ref_log_probs[keep]
        kept_before = F.pad(keep.flatten().cumsum(0), (1, 0))  # (rows + 1,)
        if cu_seqlens is None:
            batch, length = target.shape
            cu_seqlens = torch.arange(batch + 1, device=target.device) * length
        else:
            check_cu_seqlens(op, cu_seqlens, len(hidden), hidden.device)
        loss, _ = linear_sequence_loss(
            hidden[keep],
            lin_weight,
            target[keep],
            kept_before[cu_seqlens.to(target.device)],
            self.loss,
            ref_log_probs=ref_log_probs,
            bias=bias,
            reduction=self.reduction,
            chunk_rows=self.chunk_rows,
            **self.transform,
        )
        return loss

    def extra_repr(self) -> str:
        """The settings, for the printed module."""
        return f"{self.loss}, reduction={self.reduction!r}"


class FusedLinearNPOLoss(FusedLinearSequenceLoss):
    """NPO: ``mean_i -(2 / beta) * logsigmoid(-beta * (l_i - ref_i))``; needs ``ref_log_probs``."""

    def __init__(self, beta: float = 0.1, **options: Any) -> None:
        super().__init__(NPO(beta), **options)


class FusedLinearDPOLoss(FusedLinearSequenceLoss):
    """DPO: ``mean_pairs -(2 / beta) * logsigmoid(beta * (r_2i - r_2i+1))``, ``r_i = l_i - ref_i``.

    Preferred answers and those to forget alternate; needs ``ref_log_probs``.
    """

    def __init__(self, beta: float = 0.1, **options: Any) -> None:
        super().__init__(DPO(beta), **options)


class FusedLinearSimNPOLoss(FusedLinearSequenceLoss):
    """SimNPO: ``mean_i -(2 / beta) * logsigmoid(beta * (-l_i / |y_i| - delta))``."""

    def __init__(self, beta: float = 2.5, delta: float = 0.0, **options: Any) -> None:
        super().__init__(SimNPO(beta, delta), **options)


class FusedLinearGALoss(FusedLinearSequenceLoss):
    """GA: ``mean_i l_i``; with ``reduction="token_mean"`` the negated cross-entropy."""

    def __init__(self, **options: Any) -> None:
        super().__init__(GA(), **options)


class FusedLinearNLLLoss(FusedLinearSequenceLoss):
    """NLL: ``mean_i -l_i``; with ``reduction="token_mean"`` the cross-entropy of Hugging Face."""

    def __init__(self, **options: Any) -> None:
        super().__init__(NLL(), **options)
