"""A loss of your own, fused with the LM head: python examples/custom_loss.py

A loss is a frozen dataclass that maps the log-probs of tokens to one value a sequence. npo_fast
differentiates it by autograd, or takes the derivative from `value_and_weight` where it has one.
Gradients of hidden states and head come from the same pass; the logits never exist as a whole.
This prints loss and gradients of both ways beside plain PyTorch with whole logits.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

from npo_fast import linear_sequence_loss, segment_sum


@dataclass(frozen=True)
class Hinge:
    """Gradient ascent until an answer is `margin` nats less likely than under the reference."""

    margin: float = 20.0
    reference: ClassVar = "sequence"  # ref_log_probs has one a sequence; "token": one a token
    group: ClassVar = 1  # sequences that one value depends on: 2 for pairs, as in DPO

    def __call__(self, log_probs, cu_seqlens, ref_log_probs):
        ratio = segment_sum(log_probs, cu_seqlens) - ref_log_probs  # (S,)
        return torch.relu(ratio + self.margin)  # (S,)


class ClosedFormHinge(Hinge):
    def value_and_weight(self, log_probs, cu_seqlens, ref_log_probs):
        log_prob = segment_sum(log_probs, cu_seqlens)  # (S,)
        values = torch.relu(log_prob - ref_log_probs + self.margin)
        slope = (values > 0).to(values.dtype)  # (S,), of a value in its log_prob
        weight = slope.repeat_interleave(cu_seqlens.diff())  # (N,), of a value in each log-prob
        return values, log_prob, weight


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__.partition("\n")[0])
    torch.manual_seed(0)
    hidden = torch.randn(24, 16, dtype=torch.float64, requires_grad=True)  # (N, D)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)  # (V, D)
    labels, cu_seqlens = torch.randint(50, (24,)), torch.tensor([0, 5, 11, 24])  # 3 sequences
    log_probs = (hidden @ weight.T).log_softmax(-1)[range(24), labels]
    # the first is as likely as under the reference, the second forgotten, the third not yet
    reference = segment_sum(log_probs.detach(), cu_seqlens) + torch.tensor([0.0, 30.0, 10.0])
    plain = Hinge()(log_probs, cu_seqlens, reference).mean()
    expected = torch.autograd.grad(plain, (hidden, weight))
    print(f"plain PyTorch: loss {plain:.6f}")
    for loss in (Hinge(), ClosedFormHinge()):
        value, _ = linear_sequence_loss(
            hidden, weight, labels, cu_seqlens, loss, ref_log_probs=reference
        )
        gradients = torch.autograd.grad(value, (hidden, weight))
        error = max((a - b).abs().max() for a, b in zip(gradients, expected, strict=True))
        print(f"{type(loss).__name__}: loss {value:.6f}, largest error of a gradient {error:.1e}")
