"""Full-batch gradient descent of many binary logistic models at once, fp64.

A model is ``P(y | x) = sigmoid(s * theta . phi(x))`` with ``s`` = +1 or -1 for y = 1 or 0 and
features ``phi(x)`` that stay fixed. An answer is one token, so the package's losses apply as they
are: every sample is a sequence of length one. Models of all seeds and methods go through one
batched matrix product a step; their gradients do not mix, since each has its own ``theta``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast.ops import SequenceLoss

Values = Callable[[Tensor], Tensor]  # theta (seeds, methods, K) -> (seeds, methods, n)


@dataclass(frozen=True)
class Samples:
    """Inputs as features, with the signs of their labels."""

    features: Tensor  # (seeds, n, K)
    signs: Tensor  # (seeds, n), +1 or -1

    def log_probs(self, theta: Tensor) -> Tensor:
        """``log P(y | x)`` of every model: (seeds, methods, n)"""
        return F.logsigmoid(self.signs.unsqueeze(1) * logits(theta, self.features))


@dataclass(frozen=True)
class Method:
    """A sum of terms to minimise, each the mean of a loss over the samples of a source."""

    name: str
    lr: float
    terms: tuple[tuple[str, SequenceLoss], ...]  # (source, loss)


def logits(theta: Tensor, features: Tensor) -> Tensor:
    """``theta . phi(x)``: (seeds, methods, n)"""
    return theta @ features.mT


def descend(
    theta: Tensor,  # (seeds, methods, K)
    methods: Sequence[Method],
    sources: Mapping[str, Values],
    steps: int,
    every: int,
) -> Iterator[tuple[int, Tensor]]:
    """Runs gradient descent; yields (step, theta) at step 0 and then every ``every`` steps.

    The reference log-probs of a loss are its values at step 0.
    """
    lr = torch.tensor([method.lr for method in methods], dtype=theta.dtype).view(1, -1, 1)
    groups = []  # methods that share a loss on a source are computed together
    for source, loss in dict.fromkeys(term for method in methods for term in method.terms):
        members = [i for i, method in enumerate(methods) if (source, loss) in method.terms]
        start = sources[source](theta[:, members])
        cu_seqlens = torch.arange(start.numel() + 1)
        groups.append((sources[source], loss, members, start.flatten(), cu_seqlens))
    theta = theta.detach().clone().requires_grad_()
    yield 0, theta.detach()
    for step in range(1, steps + 1):
        total = torch.zeros((), dtype=theta.dtype)
        for values_of, loss, members, reference, cu_seqlens in groups:
            values = values_of(theta[:, members])
            total = total + loss(values.flatten(), cu_seqlens, reference).sum() / values.shape[-1]
        (gradient,) = torch.autograd.grad(total, theta)
        with torch.no_grad():
            theta -= lr * gradient
        if step % every == 0:
            yield step, theta.detach()
