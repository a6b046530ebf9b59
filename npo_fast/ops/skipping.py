"""Rows whose gradient no longer matters: tokens the model is sure of, sequences it has forgotten.

With ``z`` scaled by s, the gradient of row n in its raw logits is ``g_n * s * (onehot - p)`` times
slopes of at most 1, so its L1 norm is at most

    bound_n = 2 * |s| * |g_n| * (1 - p_n)

which is known right after the row kernel. Rows below a fraction of the largest bound of their chunk
leave before the two GEMMs of the backward pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SLAB_BYTES = 4 << 20  # of a chunk that is compacted


@dataclass
class Skipped:
    """Filled by ``linear_sequence_loss(..., skip_below=..., skipped=Skipped())``.

    The errors are bounds on what is missing from the gradients of the reduced loss, in exact
    arithmetic: ``logits_error`` on the L1 norm over all rows of the gradient in the logits,
    ``weight_error`` on the Frobenius norm of that in the weight.
    """

    rows: int = 0
    skipped_rows: int = 0
    logits_error: float = 0.0
    weight_error: float = 0.0

    @property
    def share(self) -> float:
        """Rows that were skipped, of all."""
        return self.skipped_rows / self.rows if self.rows else 0.0


def rows_that_matter(
    hidden: Tensor,  # (R, D)
    log_probs: Tensor,  # (R,)
    g: Tensor,  # (R,) d loss / d log_prob
    logit_scale: float,
    skip_below: float,
    skipped: Skipped | None,
) -> Tensor | None:  # ascending row numbers, or None where every row matters
    """Reads one number a row back to the host: on a GPU it waits for the row kernel."""
    if not len(g):
        return None
    bound = 2 * abs(logit_scale) * g.abs() * -torch.expm1(log_probs)
    out = bound < skip_below * bound.max()  # NaN compares false and stays
    if skipped is not None:
        skipped.rows += len(bound)
        skipped.skipped_rows += int(out.sum())
        skipped.logits_error += float(bound[out].sum())
        skipped.weight_error += float((bound[out] * hidden[out].norm(dim=1).to(bound)).sum())
    return (~out).nonzero().squeeze(1) if bool(out.any()) else None


def compact_(chunk: Tensor, rows: Tensor) -> Tensor:  # (R, V), (K,) -> (K, V), a view of chunk
    """Moves ``rows`` (ascending) to the front of the chunk, a slab of columns at a time."""
    kept = chunk[: len(rows)]
    step = max(1, SLAB_BYTES // (max(1, len(rows)) * chunk.itemsize))
    for to, of in zip(kept.split(step, dim=1), chunk.split(step, dim=1), strict=True):
        to.copy_(of.index_select(0, rows))
    return kept
