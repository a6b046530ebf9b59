"""Figures of what several seeds gave: means, and how far the seeds lie apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npo_fast.report.svg import INK, figure, line_style, logarithmic


@dataclass(frozen=True)
class Band:
    """A line with its spread. ``index`` keeps a name's colour and marker on the page."""

    index: int
    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    mark: float | None = None  # the one of ``x`` at which a cross is set on the line


def bands(
    key: str,  # unique on the page
    title: str,
    x: str,
    y: str,
    series: Mapping[str, Band],
    log: str = "",  # the axes that are logarithmic: "x", "y", "xy"
    line: float | None = None,
) -> str:
    """Lines in shaded bands; few points have bars in place of a band."""

    def draw(axes: Any) -> None:
        for name, band in series.items():
            look = line_style(band.index) | {"label": name, "linewidth": 1.4, "markersize": 4}
            if len(band.x) > 8:
                axes.plot(band.x, band.middle, **look | {"markersize": 3})
                axes.fill_between(
                    band.x, band.low, band.high, color=look["color"], alpha=0.15, linewidth=0
                )
            else:
                below = [m - low for m, low in zip(band.middle, band.low, strict=True)]
                above = [high - m for m, high in zip(band.middle, band.high, strict=True)]
                axes.errorbar(band.x, band.middle, yerr=(below, above), capsize=3, **look)
            if band.mark is not None:
                at = list(band.x).index(band.mark)
                axes.plot(band.x[at], band.middle[at], "X", color=look["color"], markersize=10,
                          markeredgecolor=INK, zorder=5)  # fmt: skip
        _finish(axes, log, line)

    return figure(key, title, x, y, draw, (4.6, 3.9))


@dataclass(frozen=True)
class Cross:
    """A point with its spread both ways: (middle, low, high)."""

    index: int
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def crosses(
    key: str,
    title: str,
    x: str,
    y: str,
    points: Mapping[str, Cross],
    log: str = "",
    line: float | None = None,
) -> str:
    """Points with a bar along each axis."""

    def draw(axes: Any) -> None:
        for name, point in points.items():
            bars = [[[middle - low], [high - middle]] for middle, low, high in (point.x, point.y)]
            look = line_style(point.index) | {"linestyle": "none", "markersize": 7, "label": name}
            axes.errorbar(point.x[0], point.y[0], xerr=bars[0], yerr=bars[1], capsize=3,
                          elinewidth=1, **look)  # fmt: skip
        _finish(axes, log, line)

    return figure(key, title, x, y, draw, (4.6, 3.9))


def _finish(axes: Any, log: str, line: float | None) -> None:
    if line is not None:
        axes.axhline(line, color=INK, alpha=0.6, linestyle="--", linewidth=1)
    for which in log:
        logarithmic(axes, which)
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(loc="outside lower center", ncols=3)
