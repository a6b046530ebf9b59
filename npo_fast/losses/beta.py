"""The beta that forgets as much as there is to forget."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from npo_fast.errors import UserError, short

SPENT = 0.1
SMALLEST = 1e-12  # of the weight that is left
ROUNDING = 1e-3  # of a log-prob, above 0
LEAST = 0.1  # nats; what is known by less is noise


def suggest_beta(
    ref_log_probs: Tensor | Sequence[float],  # (S,)
    unknown_log_probs: Tensor | Sequence[float] | float,  # (S,), or their median
    spent: float = SPENT,
) -> float:
    """The beta with which NPO forgets about as far as a model stands that never knew.

        beta = ln(2 / spent - 1) / (median_i l_i(reference) - median_i l_i(unknown))

    The weight ``2 sigmoid(beta r)`` of a sequence is 1 at the start, and ``spent`` where
    ``r = -ln(2 / spent - 1) / beta``: with a beta from here, at the distance between the reference
    and a model that does not know. NPO then forgets that far and slows down; with a smaller beta it
    goes on far below, with a larger one it stops early. Medians, since a few answers with rare
    words are unlikely beyond measure.

    Args:
        ref_log_probs: log-probs of whole forget answers under the model before unlearning, nats.
        unknown_log_probs: the same, or of other answers of the kind, under a model that never knew
            them; or one number for their median.
        spent: what is left of the weight there, above 0 and below 1.

    Returns:
        beta, for ``NPO``. In ``DPO`` and ``KTO`` the weight also moves with the other answers.

    Raises:
        UserError: what is no log-prob (a NaN, an infinity, above 0) or no numbers of shape (S,), or
            a reference that knows the answers better by less than 0.1 nats.

    Source: this package; the weight is that of arXiv 2404.05868, section 3.
    """
    if not (isinstance(spent, (int, float)) and SMALLEST <= spent < 1):
        raise UserError(f"suggest_beta: spent must be between 0 and 1, got {spent!r}")
    known = _median("ref_log_probs", ref_log_probs)
    unknown = _median("unknown_log_probs", unknown_log_probs)
    if known - unknown < LEAST:
        raise UserError(
            f"a forget answer has the median log-prob {known:.4g} under the reference and "
            f"{unknown:.4g} under a model that never knew it: there is nothing to forget, and no "
            "beta to suggest"
        )
    return math.log(2 / spent - 1) / (known - unknown)


def _median(name: str, log_probs: Tensor | Sequence[float] | float) -> float:
    try:
        tensor = torch.as_tensor(log_probs).detach()
        if tensor.is_complex():
            raise TypeError("complex numbers")
        values = tensor.cpu().double().numpy()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"suggest_beta: {name} must be log-probs of sequences, got {short(log_probs)} ({error})"
        ) from error
    if values.ndim > 1 or not values.size:
        raise UserError(
            f"suggest_beta: {name} must be the log-probs of some sequences, (S,), got the shape "
            f"{values.shape}"
        )
    if (odd := values[~(np.isfinite(values) & (values <= ROUNDING))]).size:
        raise UserError(
            f"suggest_beta: {name} must be finite and no more than 0, as log-probs are, got "
            f"{odd.flat[0]}"
        )
    return float(np.median(values))
