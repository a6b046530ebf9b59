"""The theorem (linear against logarithmic divergence) and the limit beta -> 0, measured.

Logistic model ``P(y | x) = sigmoid(s * theta . x)``, n_f <= d nearly orthogonal unit samples, mean
losses, gradient descent with step ``eta``. Distance from the start in the norm of ``X^T X``:

    GA     D(t) ~ n_f^(-1/2) * eta * t
    NPO    D(t) ~ sqrt(n_f) / beta * log(C * eta * t / n_f + 1)

Source: arXiv 2404.05868, theorem 2 and proposition 1.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from npo_fast.experiments.synthetic.descent import Method, Samples, descend
from npo_fast.losses import GA, NPO
from npo_fast.ops import SequenceLoss

DIMENSION = 1024
SIZES = (8, 16, 32, 64, 128)
RATES = (4.0, 8.0, 16.0, 32.0)
SIZE, RATE = 32, 16.0  # while the other one varies
BETA = 1.0
EXPONENTS = {  # of the theorem: (loss, axis) -> of its coefficient in the axis
    ("GA", "samples"): -0.5, ("GA", "eta"): 0.0, ("NPO", "samples"): 0.5, ("NPO", "eta"): 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Law:
    """The law fitted to one run.

    GA: ``D = scale * eta * t``. NPO: ``D = scale * log(c * eta * t / n + 1)``.
    """

    loss: str  # "GA" or "NPO"
    samples: int
    eta: float
    steps: list[int]
    mean: list[float]  # distance over the seeds
    std: list[float]
    scale: float
    c: float | None
    r2: float


@dataclass(frozen=True)
class Exponent:
    """Exponent of ``scale ~ axis^value``, by least squares on logarithms, and the theorem's."""

    loss: str
    axis: str
    value: float
    theorem: float


@dataclass(frozen=True)
class Limit:
    """NPO - (2 / beta) log 2 against GA - E log p_ref, and their gradients, away from the start."""

    beta: float
    loss_difference: float
    gradient_difference: float  # relative, Euclidean


@dataclass(frozen=True)
class Theory:
    """Everything measured about the theorem and the limit."""

    laws: list[Law]
    exponents: list[Exponent]
    limits: list[Limit]
    limit_order: float  # exponent of beta in loss_difference


def run(seeds: Sequence[int], steps: int, log: Callable[[str], None]) -> Theory:
    """Varies n_f at fixed eta and eta at fixed n_f, with ``steps`` of gradient descent each."""
    log(f"theorem: GA and NPO, {steps} steps, n_f {SIZES[0]} to {SIZES[-1]}, d {DIMENSION}")
    laws = [law for n in SIZES for law in _laws(seeds, n, (RATE,), steps)]
    laws += _laws(seeds, SIZE, [eta for eta in RATES if eta != RATE], steps)
    exponents = []
    for (loss, axis), theorem in EXPONENTS.items():
        chosen = varied(laws, loss, axis)
        slope = _slope([getattr(law, axis) for law in chosen], [law.scale for law in chosen])
        exponents.append(Exponent(loss, axis, slope, theorem))
    limits = [_limit(seeds, beta) for beta in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)]
    small = limits[2:]
    order = _slope([x.beta for x in small], [x.loss_difference for x in small])
    return Theory(laws, exponents, limits, order)


def nearly_orthogonal(seeds: Sequence[int], n: int) -> tuple[Samples, Tensor]:
    """Random unit samples with labels drawn from a random model, and the model's ``theta``.

    Logits at the start are about N(0, 1), whatever n is.
    """
    drawn = []
    for seed in seeds:
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(n, DIMENSION, generator=random, dtype=torch.float64)
        x = x / x.norm(dim=1, keepdim=True)
        theta = torch.randn(DIMENSION, generator=random, dtype=torch.float64)
        coins = torch.rand(n, generator=random, dtype=torch.float64)
        drawn.append((x, torch.where(coins < (x @ theta).sigmoid(), 1.0, -1.0).double(), theta))
    x, signs, theta = (torch.stack(column) for column in zip(*drawn, strict=True))
    return Samples(x, signs), theta.unsqueeze(1)


def _laws(seeds: Sequence[int], n: int, etas: Sequence[float], steps: int) -> Iterator[Law]:
    samples, start = nearly_orthogonal(seeds, n)
    losses: tuple[tuple[str, SequenceLoss], ...] = (("GA", GA()), ("NPO", NPO(BETA)))
    methods = [Method(name, eta, (("forget", loss),)) for name, loss in losses for eta in etas]
    at_steps, distances = [], []
    start = start.repeat(1, len(methods), 1)
    every = max(1, steps // 200)
    for step, theta in descend(start, methods, {"forget": samples.log_probs}, steps, every):
        at_steps.append(step)
        distances.append(((theta - start) @ samples.features.mT).norm(dim=-1))
    curves = torch.stack(distances)  # (steps, seeds, methods)
    mean, std = curves.mean(1).numpy(), curves.std(1, correction=0).numpy()
    for i, method in enumerate(methods):
        scale, c, r2 = fit(method.name, np.array(at_steps) * method.lr, mean[:, i], n)
        curve = mean[:, i].tolist(), std[:, i].tolist()
        yield Law(method.name, n, method.lr, at_steps, *curve, scale, c, r2)


def fit(
    loss: str,
    eta_t: np.ndarray,  # (T,)
    distance: np.ndarray,  # (T,)
    n: int,
) -> tuple[float, float | None, float]:
    """Fits the law of a loss by least squares: (scale, C, R^2), with C for NPO alone."""

    def line(x: np.ndarray) -> tuple[float, float]:
        scale = float(x @ distance / (x @ x))
        return scale, float(((distance - scale * x) ** 2).sum())

    total = float(((distance - distance.mean()) ** 2).sum())
    if loss == "GA":
        scale, rest = line(eta_t)
        return scale, None, 1 - rest / total
    best = minimize_scalar(
        lambda log_c: line(np.log1p(np.exp(log_c) * eta_t / n))[1], bounds=np.log([1e-3, 1e3])
    )
    c = float(np.exp(best.x))
    scale, rest = line(np.log1p(c * eta_t / n))
    return scale, c, 1 - rest / total


def varied(laws: Iterable[Law], loss: str, axis: str) -> list[Law]:
    """The laws of a loss over "samples" or "eta", with the other one fixed."""
    fixed, value = ("eta", RATE) if axis == "samples" else ("samples", SIZE)
    return [law for law in laws if law.loss == loss and getattr(law, fixed) == value]


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _limit(seeds: Sequence[int], beta: float) -> Limit:
    """Measures the limit at models that gradient ascent has moved away from the reference."""
    samples, start = nearly_orthogonal(seeds, SIZE)
    ascent = [Method("GA", 1.0, (("forget", GA()),))]
    *_, (_, moved) = descend(start, ascent, {"forget": samples.log_probs}, 100, 100)
    reference = samples.log_probs(start).flatten()
    theta = moved.clone().requires_grad_()
    cu_seqlens = torch.arange(len(reference) + 1)
    log_probs = samples.log_probs(theta).flatten()
    npo = NPO(beta)(log_probs, cu_seqlens, reference).mean() - 2 / beta * np.log(2)
    ga = GA()(log_probs, cu_seqlens).mean() - reference.mean()
    (npo_gradient,) = torch.autograd.grad(npo, theta, retain_graph=True)
    (ga_gradient,) = torch.autograd.grad(ga, theta)
    difference = (npo_gradient - ga_gradient).norm() / ga_gradient.norm()
    return Limit(beta, float((npo - ga).detach().abs()), float(difference))
