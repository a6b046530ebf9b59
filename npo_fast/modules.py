"""The fused losses as ``nn.Module``s, called as other fused linear preference losses are.

    loss = FusedLinearNPOLoss(beta=0.1)(lin_weight, hidden, target, bias, ref_log_probs)

A target is *already shifted*: ``target[b, t]`` is the token that ``hidden[b, t]`` predicts, so a
batch of token ids gives ``hidden[:, :-1]`` and ``ids[:, 1:]``.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from npo_fast.errors import UserError
from npo_fast.kernels.transform import HeadTransform, PairedTransformOptions, TransformOptions
from npo_fast.losses import DPO, GA, KTO, NLL, NPO, Averaged, SimNPO
from npo_fast.ops import (
    Reduction,
    SequenceLoss,
    linear_kl,
    linear_sequence_loss,
    segment_sum,
)
from npo_fast.ops.checks import check_loss, check_tensors
from npo_fast.ops.sequence_log_probs import LabelledRows, labelled_rows

Pairs = Literal["interleaved", "concatenated"]
PAIRED = *HeadTransform._fields, *(f"ref_{name}" for name in HeadTransform._fields)


class FusedLinearSequenceLoss(nn.Module):
    """``reduce_i L(log-probs of sequence i)`` for any ``SequenceLoss``, from hidden states.

    Rows without a label are dropped before the head: prompts and padding cost nothing. Selecting
    rows costs a GPU one synchronisation a call; a batch of more than one chunk has a second, for
    the boundaries of its sequences.

    Args:
        loss: ``NPO(beta)`` and siblings, or anything that follows ``SequenceLoss``.
        reduction, chunk_rows, softcap, logit_scale: as in ``linear_sequence_loss``.
        pairs: how a batch holds the pairs of DPO: "interleaved", an answer to prefer and one to
            forget in turn, or "concatenated", first all to prefer, then all to forget (as in TRL).
        average_log_prob: the loss is one of mean log-probs of tokens, ``l_i / |y_i|``; those of
            the reference are means as well.
        return_log_probs: return the loss and the detached log-probs of the sequences, (S,).
        ignore_index: the target of a position without a label.

    Raises:
        UserError: a setting that makes no sense.
    """

    def __init__(
        self,
        loss: SequenceLoss,
        *,
        reduction: Reduction | Literal["none"] = "mean",
        pairs: Pairs = "interleaved",
        average_log_prob: bool = False,
        return_log_probs: bool = False,
        ignore_index: int = -100,
        chunk_rows: int | None = None,
        **transform: Unpack[TransformOptions],
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_loss(op, loss)
        if pairs not in ("interleaved", "concatenated"):
            raise UserError(f"{op}: pairs must be 'interleaved' or 'concatenated', got {pairs!r}")
        if reduction not in ("mean", "token_mean", "sum", "none"):
            raise UserError(
                f"{op}: reduction must be 'mean', 'token_mean', 'sum' or 'none', got {reduction!r}"
            )
        if pairs == "concatenated" and loss.group != 2:
            raise UserError(f"{op}: pairs='concatenated' is for losses of pairs, not for {loss!r}")
        _check_options(op, transform, HeadTransform._fields)
        self.loss: SequenceLoss = Averaged(loss) if average_log_prob else loss  # type: ignore
        self.reduction: Reduction | Literal["none"] = reduction
        self.pairs, self.return_log_probs = pairs, return_log_probs
        self.transform, self.chunk_rows, self.ignore_index = transform, chunk_rows, ignore_index

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        hidden: Tensor,  # (B, T, D) or (N, D)
        target: Tensor,  # (B, T) or (N,)
        bias: Tensor | None = None,  # (V,)
        ref_log_probs: Tensor | None = None,  # (B,) or (S,); one a token: as target
        *,
        cu_seqlens: Tensor | None = None,  # (S + 1,)
        **transform: Unpack[TransformOptions],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the loss, differentiable in ``hidden``, ``lin_weight`` and ``bias``.

        It is a scalar, or with ``reduction="none"`` a value a sequence or pair. With
        ``return_log_probs`` the log-probs of the sequences come second, in the order of the batch.

        Args:
            lin_weight: the LM head, in the dtype of ``hidden``; frozen, its GEMM is not done.
            hidden: a padded batch (B, T, D), one sequence a row, or S sequences end to end (N, D).
            target: shifted labels with ``ignore_index`` where there is none. A sequence without
                any label has log-prob 0: no gradient, and its constant in the mean.
            ref_log_probs: log-prob of each sequence's labels under the reference model, where the
                loss needs it; of each label, in the shape of ``target``, for TNPO.
            cu_seqlens: for flat input: sequence i is rows ``cu_seqlens[i]`` to
                ``cu_seqlens[i + 1]`` of ``hidden``, rows without a label included.
            softcap, logit_scale: in place of the module's; ``head_of(model)`` has them and bias.

        Raises:
            UserError: shapes, dtypes, devices, labels or offsets that do not fit together, or a
                missing reference; the message names the shape.
        """
        op = type(self).__name__
        _check_options(op, transform, HeadTransform._fields)
        rows = _target_rows(self, lin_weight, hidden, target, bias, cu_seqlens)
        order = None
        sequences = len(rows.cu_seqlens) - 1
        if self.pairs == "concatenated" and sequences % 2 == 0:  # else refused below
            order = torch.arange(sequences, device=target.device).view(2, -1).t().flatten()
            rows = rows.in_order(order)
        if ref_log_probs is not None and self.loss.reference is not None:
            check_tensors(op, ref_log_probs=ref_log_probs)
            per_token = self.loss.reference == "token"
            shape = target.shape if per_token else (sequences,)
            if ref_log_probs.shape != shape:
                what = "in the shape of target, {}" if per_token else "of shape {}, one a sequence"
                raise UserError(
                    f"{op}: {type(self.loss).__name__} needs ref_log_probs "
                    f"{what.format(tuple(shape))}, got {tuple(ref_log_probs.shape)}"
                )
            if per_token:
                ref_log_probs = rows.of(ref_log_probs)
            elif order is not None:
                ref_log_probs = ref_log_probs[order.to(ref_log_probs.device)]
        options: TransformOptions = {**self.transform, **transform}
        loss, log_probs = linear_sequence_loss(
            rows.of(hidden),
            lin_weight,
            rows.labels,
            rows.cu_seqlens,
            self.loss,
            ref_log_probs=ref_log_probs,
            bias=bias,
            reduction=self.reduction,
            chunk_rows=self.chunk_rows,
            **options,
        )
        if not self.return_log_probs:
            return loss
        return loss, log_probs if order is None else log_probs[order.argsort()]

    def extra_repr(self) -> str:
        """The settings, for the printed module."""
        pairs = f", pairs={self.pairs!r}" if self.loss.group == 2 else ""
        return f"{self.loss}, reduction={self.reduction!r}{pairs}"


class FusedLinearNPOLoss(FusedLinearSequenceLoss):
    """NPO: ``mean_i -(2 / beta) * logsigmoid(-beta * (l_i - ref_i))``; needs ``ref_log_probs``."""

    def __init__(self, beta: float = 0.1, **options: Any) -> None:
        super().__init__(NPO(beta), **options)


class FusedLinearDPOLoss(FusedLinearSequenceLoss):
    """DPO: ``mean_pairs -(2 / beta) * logsigmoid(beta * (r_w - r_l))``, ``r_i = l_i - ref_i``.

    w is the answer to prefer and l the one to forget; ``pairs`` says where the batch has them.
    Needs ``ref_log_probs``. TRL's DPO loss has no factor ``2 / beta``.
    """

    def __init__(self, beta: float = 0.1, **options: Any) -> None:
        super().__init__(DPO(beta), **options)


class FusedLinearKTOLoss(FusedLinearSequenceLoss):
    """KTO on answers to forget: ``mean_i 1 - (2 / beta) * logsigmoid(z - beta * (l_i - ref_i))``.

    Needs ``ref_log_probs``, and ``z``, the mean log-ratio of refusals to the batch's questions:
    ``(sequence_log_probs(…) - ref).mean()`` under ``torch.no_grad``.
    """

    def __init__(self, beta: float = 0.1, **options: Any) -> None:
        super().__init__(KTO(beta), **options)
        self.beta = beta

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        hidden: Tensor,  # (B, T, D) or (N, D)
        target: Tensor,  # (B, T) or (N,)
        bias: Tensor | None = None,  # (V,)
        ref_log_probs: Tensor | None = None,  # (B,) or (S,)
        *,
        z: Tensor | float = 0.0,
        cu_seqlens: Tensor | None = None,  # (S + 1,)
        **transform: Unpack[TransformOptions],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the loss as ``FusedLinearSequenceLoss`` does; ``z`` is one number."""
        if ref_log_probs is not None:
            check_tensors(type(self).__name__, ref_log_probs=ref_log_probs)
            ref_log_probs = ref_log_probs + z / self.beta  # z - beta r, as a reference of r
        return super().forward(
            lin_weight, hidden, target, bias, ref_log_probs, cu_seqlens=cu_seqlens, **transform
        )


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


class FusedLinearKLLoss(nn.Module):
    """``reduce_n KL(reference || model)`` over the rows with a label, from hidden states and heads.

    Args:
        demotion: nats by which the reference likes each label less (UNDIAL); 0 is the plain KL.
        reduction: "mean" over rows, or "sum"; "none": the sum over the rows of each sequence.
        ignore_index: the target of a position that does not count.
        chunk_rows, softcap, logit_scale, ref_softcap, ref_logit_scale: as in ``linear_kl``.
    """

    def __init__(
        self,
        demotion: float = 0.0,
        *,
        reduction: Literal["mean", "sum", "none"] = "mean",
        ignore_index: int = -100,
        chunk_rows: int | None = None,
        **transforms: Unpack[PairedTransformOptions],
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise UserError(
                f"{type(self).__name__}: reduction must be 'mean', 'sum' or 'none', got "
                f"{reduction!r}"
            )
        _check_options(type(self).__name__, transforms, PAIRED)
        self.demotion, self.ignore_index, self.chunk_rows = demotion, ignore_index, chunk_rows
        self.reduction: Literal["mean", "sum", "none"] = reduction
        self.transforms = transforms

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        hidden: Tensor,  # (B, T, D) or (N, D)
        target: Tensor,  # (B, T) or (N,)
        bias: Tensor | None = None,  # (V,)
        ref_hidden: Tensor | None = None,  # (B, T, D') or (N, D')
        ref_weight: Tensor | None = None,  # (V, D')
        ref_bias: Tensor | None = None,  # (V,)
        *,
        cu_seqlens: Tensor | None = None,  # (S + 1,)
        **transforms: Unpack[PairedTransformOptions],
    ) -> Tensor:  # scalar, or (B,) or (S,)
        """Returns the divergence, differentiable in ``hidden``, ``lin_weight`` and ``bias``.

        Args:
            target: shifted labels, with ``ignore_index`` where a position does not count; all
                positions that are not padding may have one.
            ref_hidden, ref_weight, ref_bias: hidden states of the same tokens under the reference,
                and its head.
            cu_seqlens: for flat input, where sequences begin and end; only ``reduction="none"``
                asks.
            softcap, logit_scale, ref_softcap, ref_logit_scale: in place of the module's.

        Raises:
            UserError: shapes, dtypes, devices or labels that do not fit together.
        """
        op = type(self).__name__
        _check_options(op, transforms, PAIRED)
        check_tensors(op, ref_hidden=ref_hidden, ref_weight=ref_weight)
        assert ref_hidden is not None  # as checked
        assert ref_weight is not None
        if ref_hidden.shape[:-1] != target.shape:
            raise UserError(
                f"{op}: ref_hidden must have the positions of target, {tuple(target.shape)}, got "
                f"{tuple(ref_hidden.shape)}"
            )
        if hidden.dim() == 2 and cu_seqlens is None and self.reduction != "none":
            cu_seqlens = torch.tensor([0, len(hidden)])  # rows do not depend on each other
        rows = _target_rows(self, lin_weight, hidden, target, bias, cu_seqlens)
        options: PairedTransformOptions = {**self.transforms, **transforms}
        kl = linear_kl(
            rows.of(hidden), lin_weight, rows.of(ref_hidden), ref_weight, bias=bias,
            ref_bias=ref_bias, labels=rows.labels if self.demotion else None,
            demotion=self.demotion, reduction=self.reduction, chunk_rows=self.chunk_rows,
            **options,
        )  # fmt: skip
        return segment_sum(kl, rows.cu_seqlens) if self.reduction == "none" else kl

    def extra_repr(self) -> str:
        """The settings, for the printed module."""
        return f"demotion={self.demotion}, reduction={self.reduction!r}"


def _check_options(op: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            hint = "; here it is lin_weight, the first argument" if name == "weight" else ""
            raise TypeError(
                f"{op} has no option {name!r}{hint}; of the head it has {', '.join(known)}"
            )


def _target_rows(
    module: FusedLinearSequenceLoss | FusedLinearKLLoss,
    lin_weight: Tensor,
    hidden: Tensor,
    target: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
) -> LabelledRows:
    """The rows with a label; warns where the loss will have no gradient to give."""
    op = type(module).__name__
    check_tensors(op, lin_weight=lin_weight, hidden=hidden, target=target)
    rows = labelled_rows(
        op, hidden, target, lin_weight, cu_seqlens, module.ignore_index, shift=False, name="target"
    )
    if bias is not None:
        check_tensors(op, bias=bias)
        if bias.shape != lin_weight.shape[:1] and bias.shape == (len(rows.cu_seqlens) - 1,):
            raise UserError(
                f"{op}: bias must be ({len(lin_weight)},), got {tuple(bias.shape)}, a number a "
                "sequence: pass ref_log_probs by its name"
            )
    trained = (hidden, lin_weight) if bias is None else (hidden, lin_weight, bias)
    if (
        module.training
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not any(tensor.requires_grad for tensor in trained)
    ):
        warnings.warn(
            f"{op}: neither hidden nor the head requires a gradient, so loss.backward() has none "
            "to give: run the decoder outside of torch.no_grad(), and do not detach hidden (in an "
            "evaluation call .eval() of the loss, or stay within torch.no_grad())",
            stacklevel=5,
        )
    return rows
