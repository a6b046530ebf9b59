"""Figures of a page: inline SVG in the colours of the page around it."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from npo_fast.metrics.evidence import MEANINGFUL

SMALLEST = 1e-50  # p-values below are drawn here, for the logarithmic axis
INK = "#010203"  # becomes currentColor: black on light pages, white on dark ones
_COLORS = (
    "#3b82d6", "#d9822b", "#2a9d6f", "#b565c9", "#d9534f", "#1fa2b5", "#a3873a", "#85888f",
    "#7a9a1f",
)  # fmt: skip
_MARKERS = "os^Dvph<>"
_DASHES = ("-", "--", "-.", ":")
_STYLE: dict[str, Any] = {
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color",
         "grid.color", "legend.labelcolor"), INK),
    "axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.18,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "text.parse_math": False, "font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9,
}  # fmt: skip
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
Array = NDArray[np.float64]
Point = tuple[float, float]  # x, y
Interval = tuple[float, float, float]  # mean over seeds, and the ends of its spread
Series = Mapping[str, tuple[int, Sequence[float], Sequence[float]]]  # run -> its index, x, y


class Figure(NamedTuple):
    """Inline SVG with the sentence below it."""

    svg: Markup
    caption: str = ""


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

    def figure(self, draw: Callable[[Any], None], size: tuple[float, float]) -> Figure:
        """The figure, once ``draw`` has put lines and legend on its axes."""
        import matplotlib
        from matplotlib import figure

        buffer, title = io.StringIO(), self.title[0].upper() + self.title[1:]
        style: Any = {**_STYLE, "svg.hashsalt": self.key}
        with matplotlib.rc_context(style):
            drawing = figure.Figure(figsize=size, layout="constrained")
            axes = drawing.add_subplot()
            draw(axes)
            if self.line is not None:
                axes.axhline(self.line, color=INK, alpha=0.6, linestyle="--", linewidth=1)
            for which in self.log:
                _make_logarithmic(axes, which)
            axes.margins(self.margin)
            axes.set(title=title, xlabel=self.x, ylabel=self.y)
            drawing.savefig(buffer, format="svg", metadata=_NO_METADATA)
        return Figure(_inline(buffer.getvalue(), self.key, title), self.caption)


def tradeoff(
    paths: Mapping[str, Sequence[Point]],  # evaluations while training, in order
    finals: Mapping[str, Point],  # of the final models
    anchors: Mapping[str, Point],  # of the models to compare with
) -> Figure:
    """Forget quality against model utility; a path leads from the start to the last step."""

    def draw(axes: Any) -> None:
        names = list(dict.fromkeys([*paths, *finals]))
        for i, name in enumerate(names):
            style = _line_style(i)
            if name in paths:
                axes.plot(
                    *zip(*paths[name], strict=True), **style, markersize=4, label=_label(name)
                )
            if name in finals:
                label = {} if name in paths else {"label": _label(name)}
                axes.plot(*finals[name], **style | {"linestyle": "none"}, markersize=10,
                          markeredgecolor=INK, **label)  # fmt: skip
        for name, point in anchors.items():
            axes.plot(*point, "*", color=INK, markersize=11)
            axes.annotate(name, point, xytext=(0, -14), textcoords="offset points", ha="center")
        axes.annotate("0.05", (1, MEANINGFUL), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", fontsize=9)  # fmt: skip
        if names:
            axes.legend()

    title, quality = "Forget quality against model utility", "forget quality (KS p-value)"
    frame = Frame("tradeoff", title, "model utility", quality, "y", MEANINGFUL, margin=0.12)
    return frame.figure(draw, (5.2, 3.8))


def truth_ratios(
    ratios: Mapping[str, tuple[int, Array]],  # run -> its index, its values
    anchors: Mapping[str, Array],
) -> Figure:
    """Empirical distribution functions of truth ratios."""

    def draw(axes: Any) -> None:
        for name, (i, values) in ratios.items():
            _ecdf(axes, values, **_line_style(i) | {"marker": ""}, label=_label(name))
        for (name, values), dash in zip(anchors.items(), ("-", ":"), strict=False):
            _ecdf(axes, values, color=INK, linestyle=dash, linewidth=1.4, label=_label(name))
        axes.set_ylim(0, 1)
        axes.legend()

    title, ratio = "Truth ratio on the forget set", "truth ratio, P(wrong) / P(right)"
    frame = Frame("truth-ratios", title, ratio, "share of items at or below", "x")
    return frame.figure(draw, (5.2, 3.5))


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

    def draw(axes: Any) -> None:
        for name, (i, x, y) in series.items():
            marker = _line_style(i)["marker"] if len(x) < 30 else ""
            axes.plot(x, y, **_line_style(i) | {"marker": marker}, markersize=3, linewidth=1.2,
                      label=_label(name))  # fmt: skip
        axes.legend()

    log = log and any(value > 0 for _, _, y in series.values() for value in y)
    return Frame(key, title, x_label, unit, "y" * log, line).figure(draw, (4.6, 3.1))


@dataclass(frozen=True)
class SeedCurve:
    """A mean curve with its spread; ``index`` chooses colour and marker."""

    index: int
    points: Sequence[tuple[float, Interval]]  # x, y
    mark: float | None = None  # the x at which a cross marks the line


def seed_curves(frame: Frame, series: Mapping[str, SeedCurve]) -> Figure:
    """Curves in shaded bands; a curve of eight points or fewer has error bars instead."""

    def draw(axes: Any) -> None:
        for name, curve in series.items():
            style = _line_style(curve.index) | {
                "label": _label(name),
                "linewidth": 1.4,
                "markersize": 4,
            }
            x = [value for value, _ in curve.points]
            middle, low, high = np.array([interval for _, interval in curve.points]).T
            if len(x) > 8:
                axes.plot(x, middle, **style | {"markersize": 3})
                axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            else:
                axes.errorbar(x, middle, (middle - low, high - middle), capsize=3, **style)
            if curve.mark is not None:
                at = x.index(curve.mark)
                axes.plot(x[at], middle[at], "X", color=style["color"], markersize=10,
                          markeredgecolor=INK, zorder=5)  # fmt: skip
        axes.figure.legend(loc="outside lower center", ncols=3)

    return frame.figure(draw, (4.6, 3.9))


def seed_points(frame: Frame, points: Mapping[str, tuple[int, Interval, Interval]]) -> Figure:
    """Points (index, x, y) with an error bar along each axis."""

    def draw(axes: Any) -> None:
        for name, (index, x, y) in points.items():
            x_bar, y_bar = ([[mean - low], [high - mean]] for mean, low, high in (x, y))
            style = _line_style(index) | {
                "linestyle": "none",
                "markersize": 7,
                "label": _label(name),
            }
            axes.errorbar(x[0], y[0], y_bar, x_bar, capsize=3, elinewidth=1, **style)
        axes.figure.legend(loc="outside lower center", ncols=3)

    return frame.figure(draw, (4.6, 3.9))


def _line_style(i: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line with this index."""
    return {
        "color": _COLORS[i % len(_COLORS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": _DASHES[i // len(_COLORS) % len(_DASHES)],
    }


def _label(name: str) -> str:
    """A name for the legend, which leaves out what begins with an underscore."""
    return f"\u200b{name}" if name.startswith("_") else name


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


def _inline(text: str, key: str, title: str) -> Markup:
    """The SVG without prolog, size and page-wide style, with ids that are unique on the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(style|metadata)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", text).replace(INK, "currentColor")
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return Markup(f'{head} class="figure" role="img" aria-label="{escape(title)}">{rest}')
