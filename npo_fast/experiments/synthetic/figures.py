"""Figures of the experiment and the theorem; bands and bars are one standard deviation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from npo_fast.experiments.synthetic.experiment import Curves, Experiment
from npo_fast.experiments.synthetic.theory import RATE, RATES, SIZE, SIZES, Theory

STYLES = {  # one colour a loss; dashed without retain data
    "GA": ("C3", "--"), "GA+RT": ("C3", "-"), "NPO": ("C0", "--"), "NPO+RT": ("C0", "-"),
    "DPO": ("C2", "--"), "DPO+RT": ("C2", "-"), "IDK+RT": ("C1", "-"),
}  # fmt: skip


def draw(experiment: Experiment, theory: Theory, folder: Path) -> list[Path]:
    """Writes the PNG files and returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figures = {
        "distances": _over_steps(plt, experiment.gap, "alpha 1: forget and retain data differ"),
        "pareto": _pareto(plt, experiment.gap),
        "no_gap": _over_steps(plt, experiment.no_gap, "alpha 0: the same inputs, other labels"),
        "small_beta": _small_beta(plt, experiment.small_beta),
        "theorem": _theorem(plt, theory),
    }
    files = []
    for name, figure in figures.items():
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=100)
        plt.close(figure)
    return files


def _over_steps(plt: Any, curves: Curves, title: str) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for name in curves.names:
        color, line = STYLES[name]
        for axes, values in zip((left, right), curves.of(name), strict=True):
            _band(axes, curves.steps, values, name, color, line)
    figure.suptitle(title)
    _label(left, "step", "forget distance, KL(retrained || model)")
    _label(right, "step", "retain distance, KL(retrained || model)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return figure


def _pareto(plt: Any, curves: Curves) -> Any:
    figure, axes = plt.subplots(figsize=(6.5, 4.8), layout="constrained")
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


def _small_beta(plt: Any, curves: Curves) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    shades = plt.get_cmap("viridis")(np.linspace(0.9, 0, len(curves.names) - 1))
    for axes, which in ((left, 0), (right, 1)):
        for name, shade in zip(curves.names[1:], reversed(shades), strict=True):
            _band(axes, curves.steps, curves.of(name)[which], name, shade, "-")
        _band(axes, curves.steps, curves.of("GA")[which], "GA", "C3", "--")
    figure.suptitle("alpha 1, lr 5e-4: NPO tends to GA as beta -> 0")
    _label(left, "step", "forget distance")
    _label(right, "step", "retain distance")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return figure


def _theorem(plt: Any, theory: Theory) -> Any:
    figure, grid = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    shades = plt.get_cmap("viridis")
    for law in sorted(theory.laws, key=lambda law: (law.samples, law.eta)):
        first = ("GA", "NPO").index(law.loss)
        panels: list[tuple[int, Sequence[float], float, str]] = []
        if law.eta == RATE:
            panels.append((first, SIZES, law.samples, f"n_f {law.samples}"))
        if law.samples == SIZE:
            panels.append((first + 2, RATES, law.eta, f"eta {law.eta:g}"))
        for panel, axis, value, label in panels:
            color = shades(0.9 * list(axis).index(value) / (len(axis) - 1))
            axes = grid[panel]
            some = slice(0, None, max(1, len(law.steps) // 12))
            steps = np.array(law.steps)
            axes.errorbar(
                steps[some], law.mean[some], law.std[some], fmt="o", markersize=3, color=color,
                label=label,
            )  # fmt: skip
            x = law.eta * steps
            c = law.c
            fitted = law.scale * (x if c is None else np.log1p(c * x / law.samples))
            axes.plot(steps, fitted, "-", color=color, linewidth=1)
    for axes, loss in zip(grid, ("GA", "NPO", "GA", "NPO"), strict=True):
        axes.set_title(f"{loss}: {'linear' if loss == 'GA' else 'logarithmic'} fits")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"left: eta {RATE:g}; right: n_f {SIZE}; points measured, lines fitted")
    grid[0].set_ylabel("distance from the start in the norm of X^T X")
    return figure


def _band(
    axes: Any, steps: Sequence[int], values: Tensor, name: str, color: Any, line: str
) -> None:
    mean = values.mean(1)
    low, high = _error(values)
    axes.plot(steps, mean, line, color=color, label=name)
    axes.fill_between(steps, mean - low, mean + high, color=color, alpha=0.15, linewidth=0)
    axes.set_yscale("log")


def _error(values: Tensor) -> np.ndarray:
    """Below and above the mean; the lower end stays positive on a logarithmic axis."""
    mean, std = values.mean(1).numpy(), values.std(1, correction=0).numpy()
    return np.stack([np.minimum(std, 0.7 * mean), std])


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
