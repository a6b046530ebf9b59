"""Learn everything, learn the retain data alone, unlearn, and measure how far apart they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from npo_fast.experiments.synthetic.dataset import FEATURES, World, draw
from npo_fast.experiments.synthetic.descent import Method, descend
from npo_fast.losses import GA, NLL, NPO
from npo_fast.ops import SequenceLoss

BETAS = (0.01, 0.1, 0.2, 0.5, 1.0)
RT = ("retain", NLL())


@dataclass(frozen=True)
class Steps:
    """How long each part runs and how often it is measured."""

    learn: int = 20000
    unlearn: int = 2000
    unlearn_every: int = 25
    small_beta: int = 10000
    small_beta_every: int = 100


QUICK = Steps(2000, 400, 25, 400, 25)


@dataclass(frozen=True)
class Curves:
    """Forget and retain distance of every method and seed over the steps."""

    alpha: float
    steps: list[int]
    methods: list[Method]
    forget: Tensor  # (steps, methods, seeds)
    retain: Tensor  # (steps, methods, seeds)
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", [method.name for method in self.methods])

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Forget and retain distances of one method: (steps, seeds) each."""
        i = self.names.index(name)
        return self.forget[:, i], self.retain[:, i]


def methods(
    ga_lr: float, npo_lr: float, npo_beta: float, dpo_lr: float, dpo_beta: float
) -> list[Method]:
    """With and without retain data (RT)."""
    forget_terms: list[tuple[str, float, tuple[str, SequenceLoss]]] = [
        ("GA", ga_lr, ("forget", GA())),
        ("IDK", ga_lr, ("idk", NLL())),
        ("NPO", npo_lr, ("forget", NPO(npo_beta))),
        ("DPO", dpo_lr, ("forget over idk", NPO(dpo_beta))),
    ]
    alone = [Method(name, lr, (term,)) for name, lr, term in forget_terms if name != "IDK"]
    return alone + [Method(f"{name}+RT", lr, (term, RT)) for name, lr, term in forget_terms]


GAP = methods(ga_lr=5e-4, npo_lr=5e-3, npo_beta=1.0, dpo_lr=5e-3, dpo_beta=0.1)  # alpha 1
NO_GAP = methods(ga_lr=1e-4, npo_lr=5e-2, npo_beta=10.0, dpo_lr=5e-2, dpo_beta=5.0)  # alpha 0
SMALL_BETA = [Method("GA", 5e-4, (("forget", GA()),))] + [
    Method(f"NPO, beta {beta:g}", 5e-4, (("forget", NPO(beta)),)) for beta in BETAS
]


@dataclass(frozen=True)
class Experiment:
    gap: Curves
    no_gap: Curves
    small_beta: Curves


def run(seeds: Sequence[int], steps: Steps, say: Callable[[str], None]) -> Experiment:
    short = steps.unlearn, steps.unlearn_every
    long = steps.small_beta, steps.small_beta_every
    gap, small_beta = _curves(seeds, 1.0, steps.learn, [(GAP, *short), (SMALL_BETA, *long)], say)
    (no_gap,) = _curves(seeds, 0.0, steps.learn, [(NO_GAP, *short)], say)
    return Experiment(gap, no_gap, small_beta)


def _curves(
    seeds: Sequence[int],
    alpha: float,
    learning_steps: int,
    runs: Sequence[tuple[Sequence[Method], int, int]],  # methods, steps, how often to measure
    say: Callable[[str], None],
) -> list[Curves]:
    world = draw(seeds, alpha)
    say(f"alpha {alpha:g}: {learning_steps} steps on all data and on the retain data")
    reference, retrained = learn(world, learning_steps)
    found = []
    for tried, steps, every in runs:
        say(f"alpha {alpha:g}: {steps} steps of {', '.join(method.name for method in tried)}")
        found.append(measure(alpha, world, reference, retrained, tried, steps, every))
    return found


def learn(world: World, steps: int) -> tuple[Tensor, Tensor]:
    """The reference (all data) and the retrained model (retain data): (seeds, 1, K) each."""
    seeds = world.forget.features.shape[0]
    both = [Method("reference", 0.05, (("everything", NLL()),)), Method("retrained", 0.05, (RT,))]
    start = torch.zeros(seeds, 2, FEATURES, dtype=torch.float64)
    *_, (_, theta) = descend(start, both, world.sources(), steps, steps)
    return theta[:, :1].clone(), theta[:, 1:].clone()


def measure(
    alpha: float,
    world: World,
    reference: Tensor,  # (seeds, 1, K)
    retrained: Tensor,  # (seeds, 1, K)
    tried: Sequence[Method],
    steps: int,
    every: int,
) -> Curves:
    """Unlearns from the reference by every method."""
    start = reference.repeat(1, len(tried), 1)
    at, distances = [], []
    for step, theta in descend(start, tried, world.sources(), steps, every):
        at.append(step)
        distances.append(world.distances(theta, retrained).mT)
    forget, retain = torch.stack(distances, 1)
    return Curves(alpha, at, list(tried), forget, retain)
