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
    rows = min(head.chunk_rows(), len(labels))
    buffer = head.buffer(rows)
    chunks: list[tuple[Tensor, ...]] = []
    for hidden_chunk, labels_chunk in zip(hidden.split(rows), labels.split(rows), strict=True):
        padded, softmax = head.logits_and_softmax(hidden_chunk, labels_chunk, buffer)
        logits = padded[: len(labels_chunk)]
        greedy = head.argmax(logits) == labels_chunk
        chunks.append((softmax.log_probs[: len(logits)], greedy, *_moments(head, logits)))
    return TokenScores(*map(torch.cat, zip(*chunks, strict=True)))


def _moments(head: Head, logits: Tensor) -> tuple[Tensor, Tensor]:  # (R, V) -> (R,), (R,)
    """Mean and std of ``log p(v)``, some rows at a time."""
    rows = max(1, MOMENTS_BYTES // (head.problem(0, False).vocabulary * head.opmath_dtype.itemsize))
    means, stds = [], []
    for raw in logits.split(rows):
        log_p = head.log_softmax(raw)
        p = log_p.exp()
        mean = head.sum_over_ranks(torch.linalg.vecdot(p, log_p))
        deviations = log_p.sub_(mean.unsqueeze(1)).square_()
        means.append(mean)
        stds.append(head.sum_over_ranks(torch.linalg.vecdot(p, deviations)).sqrt_())
    return torch.cat(means), torch.cat(stds)
