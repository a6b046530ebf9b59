"""Rows whose gradient no longer matters: tokens the model is sure of, sequences it has forgotten.

The gradient of row n in its raw logits is ``g_n * (onehot - p)`` times the slopes of the head's
transform, which are at most s. So its L1 norm is at most

    bound_n = 2 * s * |g_n| * (1 - p_n)

which is known right after the row kernel. Rows below a fraction of the largest bound of their chunk
leave before the two GEMMs of the backward pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from npo_fast.ops.head import Head, Softmax

SLAB_BYTES = 4 << 20  # of the chunk, a few columns at a time, while it is compacted


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
        """The fraction of rows that were skipped."""
        return self.skipped_rows / self.rows if self.rows else 0.0


def without_small_rows(
    head: Head,
    logits: Tensor,  # (padded R, V) raw
    hidden: Tensor,  # (R, D)
    softmax: Softmax,
    g: Tensor,  # (R,) d loss / d log_prob
    fraction: float,  # of the largest bound
    skipped: Skipped | None,  # gets what is left out added
) -> tuple[Tensor, Tensor, Softmax, Tensor, Tensor | None]:
    """Returns logits, hidden, softmax and g of the rows that are kept, and their numbers (K,).

    The logits move to the front of the chunk, in place. The numbers are None, and all else is as it
    was, where every row is kept. Reads one number a row: on a GPU it waits for the row kernel.
    """
    bound = 2 * head.transform.largest_slope * g.abs() * -torch.expm1(softmax.log_probs[: len(g)])
    small = bound < fraction * bound.max() if len(g) else bound > 0  # NaN is not small
    if skipped is not None:
        skipped.rows += len(bound)
        skipped.skipped_rows += int(small.sum())
        skipped.logits_error += float(bound[small].sum())
        skipped.weight_error += float((bound[small] * hidden[small].norm(dim=1).to(bound)).sum())
    if not bool(small.any()):
        return logits, hidden, softmax, g, None
    kept = (~small).nonzero().squeeze(1)
    step = max(1, SLAB_BYTES // (max(1, len(kept)) * logits.itemsize))
    front = logits[: len(kept)]
    for target, source in zip(front.split(step, dim=1), logits.split(step, dim=1), strict=True):
        target.copy_(source.index_select(0, kept))
    padded = head.padded(len(kept))
    return logits[:padded], hidden[kept], softmax.select(kept, padded), g[kept], kept
