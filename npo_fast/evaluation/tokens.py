"""What the model says of every answer token, a chunk of rows at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from npo_fast.ops.head import Head

SLAB_BYTES = 8 << 20  # of fp32 logits: a few rows of a chunk, whose moments are taken at a time


@dataclass(frozen=True)
class TokenScores:
    """N answer tokens; the moments are those of ``log p(v)`` over the vocabulary, ``v ~ p``."""

    log_probs: Tensor  # (N,) fp32
    greedy: Tensor  # (N,) bool, whether the label is the argmax
    mean: Tensor  # (N,) sum_v p(v) log p(v)
    std: Tensor  # (N,) sqrt(sum_v p(v) (log p(v) - mean)^2)

    def split(self, lengths: list[int]) -> list["TokenScores"]:
        """One a sequence, on the CPU."""
        parts = (value.cpu().split(lengths) for value in vars(self).values())
        return [TokenScores(*columns) for columns in zip(*parts, strict=True)]


@torch.no_grad()
def token_scores(head: Head, hidden: Tensor, labels: Tensor) -> TokenScores:  # (N, D), (N,)
    """Log-probs from the same kernel as the losses; the logits of all N are never there at once."""
    rows = len(labels)
    found = TokenScores(
        log_probs=hidden.new_empty(rows, dtype=head.opmath_dtype),
        greedy=torch.empty_like(labels, dtype=torch.bool),
        mean=hidden.new_empty(rows, dtype=head.opmath_dtype),
        std=hidden.new_empty(rows, dtype=head.opmath_dtype),
    )
    step = head.chunk_rows()
    buffer = head.buffer(min(step, rows))
    for chunk in torch.arange(rows).split(step):
        part = slice(int(chunk[0]), int(chunk[-1]) + 1)
        padded = head.logits(hidden[part], buffer)
        logits = padded[: len(chunk)]
        found.greedy[part] = logits.argmax(-1) == labels[part]
        _moments(head, logits, found.mean[part], found.std[part])
        softmax = head.softmax(padded, hidden[part], labels[part])
        found.log_probs[part] = softmax.log_probs[: len(chunk)]
    return found


def _moments(head: Head, logits: Tensor, mean: Tensor, std: Tensor) -> None:  # (R, V), (R,), (R,)
    slab = max(1, SLAB_BYTES // (logits.shape[1] * head.opmath_dtype.itemsize))
    parts = (logits.split(slab), mean.split(slab), std.split(slab))
    for raw, mean_out, std_out in zip(*parts, strict=True):
        log_p = head.activate(raw).log_softmax(-1)
        p = log_p.exp()
        mean_out.copy_(torch.linalg.vecdot(p, log_p))
        spread = log_p.sub_(mean_out.unsqueeze(1)).square_()
        std_out.copy_(torch.linalg.vecdot(p, spread).sqrt_())
