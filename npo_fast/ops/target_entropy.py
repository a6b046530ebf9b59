"""Entropy of the distribution that a head predicts, with the label left out of it."""

import torch
from torch import Tensor

from npo_fast.ops.head import Head
from npo_fast.ops.vocab_parallel import SlicedHead

SLAB_BYTES = 8 << 20  # of fp32 logits at a time


@torch.no_grad()
def entropy_without_labels(
    head: Head,
    hidden: Tensor,  # (N, D)
    labels: Tensor,  # (N,)
) -> Tensor:  # (N,) fp32 (fp64 for fp64 weights), in nats
    """``H(q_n)``, where ``q_n`` is the softmax over the vocabulary without ``labels[n]``.

        H = o - sum_v q_v z_v,    o = logsumexp_{v != y} z_v

    Holds the logits of one chunk of rows at a time (2NDV flops). Of a slice of the vocabulary the
    two numbers a row are combined over all ranks.
    """
    column, mine = head.localize(labels)
    rows = min(head.chunk_rows(), max(1, len(labels)))
    slab = max(1, SLAB_BYTES // (len(head.weight) * head.opmath_dtype.itemsize))
    buffer = head.buffer(rows)
    parts = []
    for hidden_chunk, columns, have in zip(
        hidden.split(rows), column.split(rows), mine.split(rows), strict=True
    ):
        logits = head.logits(hidden_chunk, buffer)[: len(columns)]
        slabs = zip(logits.split(slab), columns.split(slab), have.split(slab), strict=True)
        parts += [_over_others(head.activate(raw), y, has) for raw, y, has in slabs]
    lse, mean = torch.cat(parts, dim=1)
    if isinstance(head, SlicedHead):
        lse, mean = head.combine_means(lse, mean)
    return torch.where(lse == -torch.inf, 0.0, lse - mean)  # nothing is left beside the label


def _over_others(
    z: Tensor,  # (R, V), overwritten
    labels: Tensor,  # (R,)
    has_label: Tensor,  # (R,) whether the label is among these columns
) -> Tensor:  # (2, R) logsumexp, and the mean of z under the softmax, without the label
    has_label = has_label.unsqueeze(1)
    column = labels.unsqueeze(1).masked_fill(~has_label, 0)  # then what stands there stays
    own = z.gather(1, column)
    z.scatter_(1, column, own.masked_fill(has_label, -torch.inf))
    lse = z.logsumexp(-1)
    q = torch.exp(z - lse.unsqueeze(1))
    impossible = z == -torch.inf  # the label, and what a bias masks: 0 * log 0 = 0
    mean = torch.linalg.vecdot(q.masked_fill_(impossible, 0.0), z.masked_fill_(impossible, 0.0))
    return torch.stack([lse, mean])
