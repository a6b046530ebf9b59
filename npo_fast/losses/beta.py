"""The beta that forgets as much as there is to forget."""

import math

import torch
from torch import Tensor

from npo_fast.errors import UserError

SPENT = 0.05


def suggest_beta(
    ref_log_probs: Tensor,  # (S,)
    unknown_log_probs: Tensor | float,  # (S,), or their mean
    spent: float = SPENT,
) -> float:
    """The beta at which NPO's pull is nearly spent where a model stands that never knew the answers.

        beta = ln(2 / spent - 1) / mean_i (l_i(reference) - l_i(unknown))

    The weight ``2 sigmoid(beta r)`` of a sequence is 1 at the start, and ``spent`` where
    ``r = -ln(2 / spent - 1) / beta``: with a beta from here, at the mean distance between the
    reference and a model that does not know. NPO then forgets that far and slows down; with a
    smaller beta it goes on far below, with a larger one it stops early.

    Args:
        ref_log_probs: log-probs of whole forget answers under the model before unlearning, nats.
        unknown_log_probs: the same under a model that never knew them, or an estimate of it.
        spent: what is left of the weight there, above 0 and below 1.

    Returns:
        beta, for ``NPO``, ``DPO`` and ``KTO``. For the paper's answers it is about its 0.1.

    Raises:
        UserError: values that are not finite, or a reference that does not know the answers better.

    Source: this package; the weight is that of arXiv 2404.05868, section 3.
    """
    if not 0 < spent < 1:
        raise UserError(f"suggest_beta: spent must be between 0 and 1, got {spent}")
    known = ref_log_probs.detach().double()
    unknown = torch.as_tensor(unknown_log_probs).detach().double().to(known.device)
    if known.ndim != 1 or not len(known) or unknown.ndim and unknown.shape != known.shape:
        raise UserError(
            f"suggest_beta: ref_log_probs must be (S,) and unknown_log_probs the same or one "
            f"number, got {tuple(known.shape)} and {tuple(unknown.shape)}"
        )
    gap = float(known.mean() - unknown.mean())
    if not math.isfinite(gap):
        raise UserError(
            f"suggest_beta: the mean log-probs must be finite, got {float(known.mean())} and "
            f"{float(unknown.mean())}"
        )
    if gap <= 0:
        raise UserError(
            f"suggest_beta: a forget answer has the mean log-prob {float(known.mean()):.4g} under "
            f"the reference and {float(unknown.mean()):.4g} under a model that never knew it: "
            "there is nothing to forget"
        )
    return math.log(2 / spent - 1) / gap
