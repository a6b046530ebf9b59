"""Figures of results over several seeds: means, and their spread."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from npo_fast.reports.svg import INK, figure, line_style, logarithmic


@dataclass(frozen=True)
class SeedCurve:
    """A mean curve with its spread; ``index`` chooses colour and marker."""

    index: int
    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    mark: float | None = None  # value of ``x`` at which a cross marks the line


def seed_curves(
    key: str,  # unique on the page
    title: str,
    x: str,
    y: str,
    series: Mapping[str, SeedCurve],
    log: str = "",  # the axes that are logarithmic: "x", "y", "xy"
    line: float | None = None,
) -> Markup:
    """Curves in shaded bands; a curve of eight points or fewer has error bars instead."""

    def draw(axes: Any) -> None:
        for name, curve in series.items():
            style = line_style(curve.index) | {"label": name, "linewidth": 1.4, "markersize": 4}
            if len(curve.x) > 8:
                axes.plot(curve.x, curve.middle, **style | {"markersize": 3})
                axes.fill_between(
                    curve.x, curve.low, curve.high, color=style["color"], alpha=0.15, linewidth=0
                )
            else:
                below = [m - low for m, low in zip(curve.middle, curve.low, strict=True)]
                above = [high - m for m, high in zip(curve.middle, curve.high, strict=True)]
                axes.errorbar(curve.x, curve.middle, yerr=(below, above), capsize=3, **style)
            if curve.mark is not None:
                at = list(curve.x).index(curve.mark)
                axes.plot(curve.x[at], curve.middle[at], "X", color=style["color"], markersize=10,
                          markeredgecolor=INK, zorder=5)  # fmt: skip
        _finish(axes, log, line)

    return figure(key, title, x, y, draw, (4.6, 3.9))


@dataclass(frozen=True)
class SeedPoint:
    """A point with its spread along each axis: (middle, low, high)."""

    index: int
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def seed_points(
    key: str,
    title: str,
    x: str,
    y: str,
    points: Mapping[str, SeedPoint],
    log: str = "",
    line: float | None = None,
) -> Markup:
    """Points with an error bar along each axis."""

    def draw(axes: Any) -> None:
        for name, point in points.items():
            bars = [[[middle - low], [high - middle]] for middle, low, high in (point.x, point.y)]
            style = line_style(point.index) | {"linestyle": "none", "markersize": 7, "label": name}
            axes.errorbar(point.x[0], point.y[0], xerr=bars[0], yerr=bars[1], capsize=3,
                          elinewidth=1, **style)  # fmt: skip
        _finish(axes, log, line)

    return figure(key, title, x, y, draw, (4.6, 3.9))


def _finish(axes: Any, log: str, line: float | None) -> None:
    if line is not None:
        axes.axhline(line, color=INK, alpha=0.6, linestyle="--", linewidth=1)
    for which in log:
        logarithmic(axes, which)
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(loc="outside lower center", ncols=3)
