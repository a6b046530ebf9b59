"""Figures of a page: inline SVG in the colours of the page around it, drawn by matplotlib.

A legend is no part of the drawing: names of runs may be long or in any script, so the page sets
them as text beside a sample of their line.
"""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from npo_fast.metrics.evidence import MEANINGFUL
from npo_fast.tables import number

SMALLEST = 1e-50  # p-values below are drawn here, for the logarithmic axis
INK = "#010203"  # becomes currentColor: black on light pages, white on dark ones
_COLORS = (  # each with a contrast of at least 3 to white and to the dark page
    "#3b82d6", "#cf7a22", "#2a9d6f", "#b565c9", "#d9534f", "#1c96a8", "#9a7f35", "#85888f",
    "#7a9a1f",
)  # fmt: skip
_MARKERS = "os^Dvph<>"
_DASHES = ("-", "--", "-.", ":")
_ANCHORS = {"original": ("*", ":"), "retrained": ("X", "-")}  # marker, dashes
_STYLE: dict[str, Any] = {
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color",
         "grid.color"), INK),
    "axes.facecolor": "none", "figure.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.18,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "text.parse_math": False, "font.size": 10, "axes.titlesize": 11,
}  # fmt: skip
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
Array = NDArray[np.float64]
Point = tuple[float, float]  # x, y
Interval = tuple[float, float, float]  # mean over seeds, and the ends of its spread
Series = Mapping[str, tuple[int, Sequence[float], Sequence[float]]]  # run -> its index, x, y


class Line(NamedTuple):
    """How the line of one name is drawn, and what its place in a legend shows."""

    name: str
    color: str
    marker: str
    dashes: str

    @classmethod
    def of(cls, name: str, index: int) -> "Line":
        """The line of the run with this index."""
        return cls(
            name,
            color_of(index),
            _MARKERS[index % len(_MARKERS)],
            _DASHES[index // len(_COLORS) % len(_DASHES)],
        )

    @classmethod
    def anchor(cls, name: str) -> "Line":
        """The line of a model that runs are compared with."""
        return cls(name, INK, *_ANCHORS[name])

    @property
    def style(self) -> dict[str, str]:
        """As matplotlib takes it."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.dashes}


def color_of(index: int) -> str:
    """The colour of the run with this index."""
    return _COLORS[index % len(_COLORS)]


@dataclass(frozen=True)
class Figure:
    """A drawing for inline SVG, with what a page sets around it."""

    title: str
    view_box: str
    drawing: Markup
    caption: str = ""
    legend: tuple[Line, ...] = ()
    text: str = ""  # what the drawing shows, for those who do not see it


@dataclass(frozen=True)
class Frame:
    """What stands around the lines of a figure."""

    key: str  # unique on the page: the prefix of all ids
    title: str  # shown with a capital letter
    x: str
    y: str
    log: str = ""  # the axes that are logarithmic: "x", "y"
    line: float | None = None  # the value at a dashed horizontal line
    caption: str = ""
    margin: float = 0.05  # between the lines and the axes, as a share of the width and height

    def figure(
        self,
        draw: Callable[[Any], None],
        size: tuple[float, float],
        legend: Iterable[Line],
        values: Mapping[str, str],
    ) -> Figure:
        """The figure, once ``draw`` has put lines on its axes.

        Args:
            size: in inches.
            values: what the line of each name shows, in words.
        """
        import matplotlib
        from matplotlib import figure

        buffer, title = io.StringIO(), self.title[0].upper() + self.title[1:]
        style: Any = {**_STYLE, "svg.hashsalt": self.key}
        with matplotlib.rc_context(style):
            canvas = figure.Figure(figsize=size, layout="constrained")
            axes = canvas.add_subplot()
            draw(axes)
            if self.line is not None:
                axes.axhline(self.line, color=INK, alpha=0.6, linestyle="--", linewidth=1)
            for which in self.log:
                _make_logarithmic(axes, which)
            axes.margins(self.margin)
            axes.set(title=title, xlabel=self.x, ylabel=self.y)
            canvas.savefig(buffer, format="svg", metadata=_NO_METADATA)
        text = "; ".join(f"{name}: {words}" for name, words in values.items())
        return Figure(title, *_inline(buffer.getvalue(), self.key), self.caption, (*legend,), text)


def tradeoff(
    runs: Sequence[str],  # all of the page, in order
    paths: Mapping[str, Sequence[Point]],  # evaluations while training, in order
    finals: Mapping[str, Point],  # of the final models
    anchors: Mapping[str, Point],  # of the models to compare with
) -> Figure:
    """Forget quality against model utility; a path leads from the start to the last step."""
    shown = paths.keys() | finals.keys()
    lines = [Line.of(name, i) for i, name in enumerate(runs) if name in shown]
    stars = [Line.anchor(name) for name in anchors]

    def draw(axes: Any) -> None:
        for line in lines:
            if line.name in paths:
                axes.plot(*zip(*paths[line.name], strict=True), **line.style, markersize=4)
            if line.name in finals:
                axes.plot(*finals[line.name], **line.style | {"linestyle": "none"}, markersize=10,
                          markeredgecolor=INK)  # fmt: skip
        for line in stars:
            axes.plot(*anchors[line.name], line.marker, color=INK, markersize=10)
        axes.annotate("0.05", (1, MEANINGFUL), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", fontsize=9)  # fmt: skip

    values = {
        name: f"utility {number(x)}, forget quality {number(y)}"
        for name, (x, y) in {**finals, **anchors}.items()
    }
    title, quality = "Forget quality against model utility", "forget quality (KS p-value)"
    frame = Frame("tradeoff", title, "model utility", quality, "y", MEANINGFUL, margin=0.12)
    return frame.figure(draw, (5.2, 3.8), [*lines, *stars], values)


def truth_ratios(
    ratios: Mapping[str, tuple[int, Array]],  # run -> its index, its values
    anchors: Mapping[str, Array],
) -> Figure:
    """Empirical distribution functions of truth ratios."""
    lines = [Line.of(name, i)._replace(marker="") for name, (i, _) in ratios.items()]
    lines += [Line.anchor(name)._replace(marker="") for name in anchors]
    drawn = {**{name: values for name, (_, values) in ratios.items()}, **anchors}

    def draw(axes: Any) -> None:
        for line in lines:
            _ecdf(axes, drawn[line.name], **line.style, linewidth=1.4)
        axes.set_ylim(0, 1)

    title, ratio = "Truth ratio on the forget set", "truth ratio, P(wrong) / P(right)"
    frame = Frame("truth-ratios", title, ratio, "share of items at or below", "x")
    medians = {name: f"median {number(float(np.median(v)))}" for name, v in drawn.items()}
    return frame.figure(draw, (5.2, 3.5), lines, medians)


def curves(
    key: str,
    title: str,
    unit: str,
    series: Series,
    log: bool = False,
    line: float | None = None,
    x_label: str = "step",
) -> Figure:
    """One quantity over the steps, a line for each run; the index chooses a run's colour."""
    lines = [Line.of(name, i) for name, (i, _, _) in series.items()]

    def draw(axes: Any) -> None:
        for line, (_, x, y) in zip(lines, series.values(), strict=True):
            every = max(1, len(x) // 8)  # markers tell lines apart without colour
            axes.plot(x, y, **line.style, markersize=3.5, markevery=every, linewidth=1.2)

    log = log and any(value > 0 for _, _, y in series.values() for value in y)
    values = {
        name: f"{number(y[0])} at {x_label} {x[0]:g}, {number(y[-1])} at {x_label} {x[-1]:g}"
        for name, (_, x, y) in series.items()
    }
    frame = Frame(key, title, x_label, unit, "y" * log, line)
    return frame.figure(draw, (4.6, 3.1), lines, values)


@dataclass(frozen=True)
class SeedCurve:
    """A mean curve with its spread; ``index`` chooses colour and marker."""

    index: int
    points: Sequence[tuple[float, Interval]]  # x, y
    mark: float | None = None  # the x at which a cross marks the line


def seed_curves(frame: Frame, series: Mapping[str, SeedCurve]) -> Figure:
    """Curves in shaded bands; a curve of eight points or fewer has error bars instead."""
    lines = [Line.of(name, curve.index) for name, curve in series.items()]

    def draw(axes: Any) -> None:
        for line, curve in zip(lines, series.values(), strict=True):
            style = {**line.style, "linewidth": 1.4, "markersize": 4}
            x = [value for value, _ in curve.points]
            middle, low, high = np.array([interval for _, interval in curve.points]).T
            if len(x) > 8:
                axes.plot(x, middle, **style | {"markersize": 3})
                axes.fill_between(x, low, high, color=line.color, alpha=0.15, linewidth=0)
            else:
                axes.errorbar(x, middle, (middle - low, high - middle), capsize=3, **style)
            if curve.mark is not None:
                at = x.index(curve.mark)
                axes.plot(x[at], middle[at], "X", color=line.color, markersize=10,
                          markeredgecolor=INK, zorder=5)  # fmt: skip

    values = {
        name: f"{number(curve.points[0][1][0])} at {frame.x} {curve.points[0][0]:g}, "
        f"{number(curve.points[-1][1][0])} at {frame.x} {curve.points[-1][0]:g}"
        for name, curve in series.items()
    }
    return frame.figure(draw, (4.6, 3.3), lines, values)


def seed_points(frame: Frame, points: Mapping[str, tuple[int, Interval, Interval]]) -> Figure:
    """Points (index, x, y) with an error bar along each axis."""
    lines = [Line.of(name, index)._replace(dashes="none") for name, (index, _, _) in points.items()]

    def draw(axes: Any) -> None:
        for line, (_, x, y) in zip(lines, points.values(), strict=True):
            x_bar, y_bar = ([[mean - low], [high - mean]] for mean, low, high in (x, y))
            axes.errorbar(x[0], y[0], y_bar, x_bar, capsize=3, elinewidth=1, markersize=7,
                          **line.style)  # fmt: skip

    values = {
        name: f"{frame.x} {number(x[0])}, {frame.y} {number(y[0])}"
        for name, (_, x, y) in points.items()
    }
    return frame.figure(draw, (4.6, 3.3), lines, values)


def _ecdf(axes: Any, values: Array, **style: Any) -> None:
    values = np.sort(np.maximum(values, SMALLEST))
    axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", **style)


def _make_logarithmic(axes: Any, which: str) -> None:
    """Makes the "x" or "y" axis logarithmic, with plain numbers as labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    plain = FuncFormatter(lambda value, _: f"{value:g}")  # the usual labels, 10^k, need TeX
    axis.set_major_formatter(plain)
    low, high = axis.get_view_interval()
    if high / low < 30:  # too few powers of ten to read a value by
        axis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axis.set_minor_formatter(plain)


def _inline(text: str, key: str) -> tuple[str, Markup]:
    """The view box of matplotlib's SVG, and what is inside, with ids unique on the page."""
    head, _, rest = text[text.index("<svg") :].partition(">")
    rest = rest[: rest.rindex("</svg>")]
    rest = re.sub(r"<(style|metadata)\b.*?</\1>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'\bid="', f'id="{key}-', rest)
    rest = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", rest).replace(INK, "currentColor")
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box is not None, head
    return box[1], Markup(rest)
