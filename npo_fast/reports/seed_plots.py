"""Figures of results over several seeds: means, and their spread."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npo_fast.reports.svg import INK, Figure, Frame, line_style

Interval = tuple[float, float, float]  # mean over seeds, and the ends of its spread
_SIZE = (4.6, 3.9)


@dataclass(frozen=True)
class SeedCurve:
    """A mean curve with its spread; ``index`` chooses colour and marker."""

    index: int
    x: Sequence[float]
    y: Sequence[Interval]
    mark: float | None = None  # value of ``x`` at which a cross marks the line


def seed_curves(frame: Frame, series: Mapping[str, SeedCurve]) -> Figure:
    """Curves in shaded bands; a curve of eight points or fewer has error bars instead."""

    def draw(axes: Any) -> None:
        for name, curve in series.items():
            style = line_style(curve.index) | {"label": name, "linewidth": 1.4, "markersize": 4}
            middle, low, high = np.array(curve.y).T
            if len(curve.x) > 8:
                axes.plot(curve.x, middle, **style | {"markersize": 3})
                axes.fill_between(curve.x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            else:
                axes.errorbar(curve.x, middle, (middle - low, high - middle), capsize=3, **style)
            if curve.mark is not None:
                at = list(curve.x).index(curve.mark)
                axes.plot(curve.x[at], middle[at], "X", color=style["color"], markersize=10,
                          markeredgecolor=INK, zorder=5)  # fmt: skip
        axes.figure.legend(loc="outside lower center", ncols=3)

    return frame.figure(draw, _SIZE)


def seed_points(frame: Frame, points: Mapping[str, tuple[int, Interval, Interval]]) -> Figure:
    """Points (index, x, y) with an error bar along each axis."""

    def draw(axes: Any) -> None:
        for name, (index, x, y) in points.items():
            x_bar, y_bar = ([[mean - low], [high - mean]] for mean, low, high in (x, y))
            style = line_style(index) | {"linestyle": "none", "markersize": 7, "label": name}
            axes.errorbar(x[0], y[0], y_bar, x_bar, capsize=3, elinewidth=1, **style)
        axes.figure.legend(loc="outside lower center", ncols=3)

    return frame.figure(draw, _SIZE)
