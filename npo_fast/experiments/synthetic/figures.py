"""Figures of the experiment and the theorem; bands and bars are one standard deviation."""

from collections.abc import Mapping
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from npo_fast.experiments.synthetic.experiment import Curves, Experiment
from npo_fast.experiments.synthetic.theory import RATE, SIZE, Theory, varied

Styles = Mapping[str, tuple[Any, str]]  # by method: colour and dashes
STYLES: Styles = {  # one colour a loss; dashed without retain data
    "GA": ("C3", "--"), "NPO": ("C0", "--"), "DPO": ("C2", "--"), "GA+RT": ("C3", "-"),
    "IDK+RT": ("C1", "-"), "NPO+RT": ("C0", "-"), "DPO+RT": ("C2", "-"),
}  # fmt: skip


def draw(experiment: Experiment, theory: Theory, folder: Path) -> None:
    """Writes the PNG files."""
    names = experiment.small_beta.names
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(names) - 1))
    betas = {name: (shade, "-") for name, shade in zip(names[1:], shades, strict=True)}
    betas["GA"] = STYLES["GA"]
    figures = {
        "distances": _over_steps("alpha 1: forget and retain data differ", experiment.gap),
        "pareto": _pareto(experiment.gap),
        "no_gap": _over_steps("alpha 0: the same inputs, other labels", experiment.no_gap),
        "small_beta": _over_steps(
            "alpha 1, lr 5e-4: NPO tends to GA as beta -> 0", experiment.small_beta, betas, unit=""
        ),
        "theorem": _theorem(theory),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=100)


def _over_steps(
    title: str, curves: Curves, styles: Styles = STYLES, unit: str = ", KL(retrained || model)"
) -> Figure:
    """Mean distances and one standard deviation about them, in the order of ``styles``."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, (color, line) in styles.items():
        for axes, values in zip((left, right), curves.of(name), strict=True):
            mean, (low, high) = values.mean(1), _error(values)
            axes.plot(curves.steps, mean, line, color=color, label=name)
            axes.fill_between(
                curves.steps, mean - low, mean + high, color=color, alpha=0.15, linewidth=0
            )
    figure.suptitle(title)
    _label(left, "step", f"forget distance{unit}")
    _label(right, "step", f"retain distance{unit}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return figure


def _pareto(curves: Curves) -> Figure:
    figure = Figure(figsize=(6.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for name in curves.names:
        color, line = STYLES[name]
        forget, retain = curves.of(name)
        axes.plot(forget.mean(1), retain.mean(1), line, color=color, label=name)
        some = slice(0, None, max(1, len(curves.steps) // 6))
        axes.errorbar(
            forget.mean(1)[some], retain.mean(1)[some], fmt=".", color=color, alpha=0.5,
            xerr=_error(forget[some]), yerr=_error(retain[some]), linewidth=0.8,
        )  # fmt: skip
    start = curves.forget[0, 0].mean(), curves.retain[0, 0].mean()
    axes.plot(*start, "k*", markersize=12, label="start", zorder=5)
    axes.set_xscale("log")
    _label(axes, "forget distance", "retain distance")
    axes.set_title("alpha 1: left and down is better")
    axes.legend(ncols=2, fontsize=9)
    return figure


def _theorem(theory: Theory) -> Figure:
    figure = Figure(figsize=(16, 4), layout="constrained")
    grid = figure.subplots(1, 4)
    panels = product(
        (("samples", "n_f"), ("eta", "eta")), (("GA", "linear"), ("NPO", "logarithmic"))
    )
    for axes, ((axis, symbol), (loss, shape)) in zip(grid, panels, strict=True):
        laws = sorted(varied(theory.laws, loss, axis), key=attrgetter(axis))
        shades = colormaps["viridis"](np.linspace(0, 0.9, len(laws)))
        for law, color in zip(laws, shades, strict=True):
            some = slice(0, None, max(1, len(law.steps) // 12))
            steps = np.array(law.steps)
            axes.errorbar(
                steps[some], law.mean[some], law.std[some], fmt="o", markersize=3, color=color,
                label=f"{symbol} {getattr(law, axis):g}",
            )  # fmt: skip
            x = law.eta * steps
            fitted = law.scale * (x if law.c is None else np.log1p(law.c * x / law.samples))
            axes.plot(steps, fitted, "-", color=color, linewidth=1)
        axes.set(title=f"{loss}: {shape} fits", xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"left: eta {RATE:g}; right: n_f {SIZE}; points measured, lines fitted")
    grid[0].set_ylabel("distance from the start in the norm of X^T X")
    return figure


def _error(values: Tensor) -> np.ndarray:
    """Below and above the mean; the lower end stays positive on a logarithmic axis."""
    mean, std = values.mean(1).numpy(), values.std(1, correction=0).numpy()
    return np.stack([np.minimum(std, 0.7 * mean), std])


def _label(axes: Any, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y, yscale="log")
    axes.grid(alpha=0.3)
