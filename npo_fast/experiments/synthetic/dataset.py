"""Forget and retain data of the synthetic experiment, and distances to the retrained model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast.experiments.synthetic.descent import Samples, logits

DIMENSION, FEATURES = 16, 128
FORGET, RETAIN, FRESH = 200, 1000, 1000  # samples


@dataclass(frozen=True)
class SyntheticDataset:
    """Samples of every seed; the labels are the answers, ``idk`` has coin flips instead.

    Forget: ``x ~ N(mu, I_16)``, ``P(y = 1) = sigmoid((x - mu) . theta + 1)`` with ``theta`` 1/4
    and ``mu`` alpha in every coordinate. Retain: the same with ``-mu``, ``-theta`` and -1. Features
    are ``ReLU(W x)`` with 128 rows of N(0, 1/16). Source: arXiv 2404.05868, section 4.
    """

    forget: Samples  # (seeds, 200, 128)
    idk: Samples  # the same inputs, labels Bernoulli(1/2)
    retain: Samples  # (seeds, 1000, 128)
    everything: Samples  # forget and retain
    fresh_forget: Tensor  # (seeds, 1000, 128)
    fresh_retain: Tensor  # (seeds, 1000, 128)

    def sources(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The values that losses are applied to, by name, as functions of ``theta``.

        "forget over idk" is ``log P(y | x) - log P(y_idk | x)``: DPO, which prefers the second
        answer, is NPO of this log-ratio.
        """
        forget, idk = self.forget.log_probs, self.idk.log_probs
        return {
            "forget": forget,
            "idk": idk,
            "forget over idk": lambda theta: forget(theta) - idk(theta),
            "retain": self.retain.log_probs,
            "everything": self.everything.log_probs,
        }

    def distances(self, theta: Tensor, retrained: Tensor) -> Tensor:
        """Mean KL(retrained || model) on fresh samples, (2, seeds, methods): forget, retain."""
        return torch.stack([
            kl(logits(retrained, features), logits(theta, features)).mean(-1)
            for features in (self.fresh_forget, self.fresh_retain)
        ])  # fmt: skip


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(p)) || Bernoulli(sigmoid(q))), elementwise, from logits."""
    heads = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
    return heads + (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))


def draw_dataset(seeds: Sequence[int], alpha: float) -> SyntheticDataset:
    """Draws the data of each seed, which depends on that seed and alpha alone."""
    columns = zip(*(_draw_one(seed, alpha) for seed in seeds), strict=True)
    forget, forget_signs, idk_signs, retain, retain_signs, *fresh = map(torch.stack, columns)
    everything = torch.cat([forget, retain], 1), torch.cat([forget_signs, retain_signs], 1)
    return SyntheticDataset(
        Samples(forget, forget_signs),
        Samples(forget, idk_signs),
        Samples(retain, retain_signs),
        Samples(*everything),
        *fresh,
    )


def _draw_one(seed: int, alpha: float) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def flip(probability: Tensor) -> Tensor:
        coins = torch.rand(len(probability), generator=random, dtype=torch.float64)
        return torch.where(coins < probability, 1.0, -1.0).double()

    first_layer = normal(FEATURES, DIMENSION) / DIMENSION**0.5

    def features(x: Tensor) -> Tensor:
        return (x @ first_layer.T).relu()

    def group(side: int, n: int) -> tuple[Tensor, Tensor]:
        noise = normal(n, DIMENSION)
        signs = flip((side * (noise.sum(1) / DIMENSION**0.5 + 1)).sigmoid())
        return features(noise + side * alpha), signs

    forget, forget_signs = group(1, FORGET)
    retain, retain_signs = group(-1, RETAIN)
    idk_signs = flip(torch.full((FORGET,), 0.5, dtype=torch.float64))
    fresh_forget, _ = group(1, FRESH)
    fresh_retain, _ = group(-1, FRESH)
    return forget, forget_signs, idk_signs, retain, retain_signs, fresh_forget, fresh_retain
