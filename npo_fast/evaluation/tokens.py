"""Scores of every answer token, a chunk of rows at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from npo_fast.ops.head import Head

MOMENTS_BYTES = 8 << 20  # of fp32 logits whose mean and std are computed at a time


@dataclass(frozen=True)
class TokenScores:
    """Scores of N answer tokens.

    ``mean`` and ``std`` are those of ``log p(v)`` over the vocabulary, with ``v ~ p``.
    """

    log_probs: Tensor  # (N,) fp32
    greedy: Tensor  # (N,) bool, whether the label is the argmax
    mean: Tensor  # (N,) sum_v p(v) log p(v)
    std: Tensor  # (N,) sqrt(sum_v p(v) (log p(v) - mean)^2)

    def split(self, lengths: list[int]) -> list["TokenScores"]:
        """Returns the scores of each sequence, on the CPU; ``lengths`` are their answer tokens."""
        parts = (value.cpu().split(lengths) for value in vars(self).values())
        return [TokenScores(*columns) for columns in zip(*parts, strict=True)]


@torch.no_grad()
def token_scores(head: Head, hidden: Tensor, labels: Tensor) -> TokenScores:  # (N, D), (N,)
    """Scores the labels with the kernels of the losses; holds the logits of one chunk at a time."""
    rows = len(labels)
    scores = TokenScores(
        log_probs=hidden.new_empty(rows, dtype=head.opmath_dtype),
        greedy=torch.empty_like(labels, dtype=torch.bool),
        mean=hidden.new_empty(rows, dtype=head.opmath_dtype),
        std=hidden.new_empty(rows, dtype=head.opmath_dtype),
    )
    step = head.chunk_rows()
    buffer = head.buffer(min(step, rows))
    for first in range(0, rows, step):
        chunk = slice(first, min(first + step, rows))
        padded = head.logits(hidden[chunk], buffer)
        logits = padded[: chunk.stop - first]
        scores.greedy[chunk] = logits.argmax(-1) == labels[chunk]
        _moments(head, logits, scores.mean[chunk], scores.std[chunk])
        softmax = head.softmax(padded, hidden[chunk], labels[chunk])
        scores.log_probs[chunk] = softmax.log_probs[: len(logits)]
    return scores


def _moments(head: Head, logits: Tensor, mean: Tensor, std: Tensor) -> None:  # (R, V), (R,), (R,)
    """Writes the moments of ``log p(v)`` into ``mean`` and ``std``, some rows at a time."""
    rows = max(1, MOMENTS_BYTES // (logits.shape[1] * head.opmath_dtype.itemsize))
    parts = (logits.split(rows), mean.split(rows), std.split(rows))
    for raw, mean_out, std_out in zip(*parts, strict=True):
        log_p = head.activate(raw).log_softmax(-1)
        p = log_p.exp()
        mean_out.copy_(torch.linalg.vecdot(p, log_p))
        deviations = log_p.sub_(mean_out.unsqueeze(1)).square_()
        std_out.copy_(torch.linalg.vecdot(p, deviations).sqrt_())
