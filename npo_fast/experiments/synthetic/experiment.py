"""Trains reference and retrained model, unlearns by every method, and measures the distances."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npo_fast.experiments.synthetic.dataset import FEATURES, SyntheticDataset, draw_dataset
from npo_fast.experiments.synthetic.descent import Method, descend
from npo_fast.losses import GA, NLL, NPO
from npo_fast.ops import SequenceLoss

BETAS = (0.01, 0.1, 0.2, 0.5, 1.0)
RT = ("retain", NLL())


@dataclass(frozen=True)
class Steps:
    """Steps of each part, and the steps between two measurements."""

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

    @property
    def names(self) -> list[str]:
        """The names of the methods."""
        return [method.name for method in self.methods]

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Forget and retain distance of one method: (steps, seeds) each."""
        i = self.names.index(name)
        return self.forget[:, i], self.retain[:, i]


def methods(
    ga_lr: float, npo_lr: float, npo_beta: float, dpo_lr: float, dpo_beta: float
) -> list[Method]:
    """GA, IDK, NPO and DPO, with and without retain data (RT); IDK only with it."""
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
    """Curves where forget and retain inputs differ, where they do not, and for small beta."""

    gap: Curves
    no_gap: Curves
    small_beta: Curves


def run(seeds: Sequence[int], steps: Steps, log: Callable[[str], None]) -> Experiment:
    """Runs the whole experiment; ``log`` gets a sentence before each part."""
    short, long = (steps.unlearn, steps.unlearn_every), (steps.small_beta, steps.small_beta_every)
    parts = {  # alpha -> the curves to measure: methods, steps, steps between two measurements
        1.0: {"gap": (GAP, *short), "small_beta": (SMALL_BETA, *long)},
        0.0: {"no_gap": (NO_GAP, *short)},
    }
    curves = {}
    for alpha, runs in parts.items():
        dataset = draw_dataset(seeds, alpha)
        log(f"alpha {alpha:g}: {steps.learn} steps on all data and on the retain data")
        reference, retrained = learn(dataset, steps.learn)
        for part, (tried, count, every) in runs.items():
            log(f"alpha {alpha:g}: {count} steps of {', '.join(method.name for method in tried)}")
            start = reference.repeat(1, len(tried), 1)
            at_steps, distances = [], []
            for step, theta in descend(start, tried, dataset.sources(), count, every):
                at_steps.append(step)
                distances.append(dataset.distances(theta, retrained).mT)
            forget, retain = torch.stack(distances, 1)
            curves[part] = Curves(alpha, at_steps, tried, forget, retain)
    return Experiment(**curves)


def learn(dataset: SyntheticDataset, steps: int) -> tuple[Tensor, Tensor]:
    """Trains the reference (all data) and the retrained model (retain data): (seeds, 1, K) each."""
    seeds = dataset.forget.features.shape[0]
    both = [Method("reference", 0.05, (("everything", NLL()),)), Method("retrained", 0.05, (RT,))]
    start = torch.zeros(seeds, 2, FEATURES, dtype=torch.float64)
    *_, (_, theta) = descend(start, both, dataset.sources(), steps, steps)
    return theta[:, :1].clone(), theta[:, 1:].clone()
