"""A figure of unlearning runs as a PNG file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from npo_fast.metrics.verdict import MEANINGFUL


@dataclass(frozen=True)
class Point:
    """One evaluation of an unlearning run."""

    epoch: int
    forget_quality: float
    model_utility: float | None = None  # None: only forget quality was measured here


def plot_unlearning(
    paths: Mapping[str, Sequence[Point]],
    anchors: Mapping[str, Point],  # models without a path, such as the retrained one
    file: Path,
) -> None:
    """Plots forget quality of several methods over epochs, and against model utility."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    over_time, against = figure.subplots(1, 2)
    for i, (name, points) in enumerate(paths.items()):
        style = {"color": f"C{i}", "marker": "os^Dvp"[i % 6]}
        qualities = [point.forget_quality for point in points]
        over_time.plot([p.epoch for p in points], qualities, **style, markersize=4, label=name)
        scores = [(point.model_utility, point.forget_quality) for point in points]
        measured = [(x, y) for x, y in scores if x is not None]
        against.plot(*zip(*measured, strict=True), **style)
        against.plot(*measured[-1], **style, markersize=12, markeredgecolor="black")
    for name, point in anchors.items():
        against.plot(point.model_utility, point.forget_quality, "k*", markersize=12)
        against.annotate(name, (point.model_utility, point.forget_quality), xytext=(0, 9),
                         textcoords="offset points", ha="center")  # fmt: skip
    against.margins(y=0.12)
    for axes in (over_time, against):
        axes.axhline(MEANINGFUL, color="grey", linestyle="--", linewidth=1)
        axes.set(yscale="log", ylabel="forget quality (KS p-value)")
        axes.grid(alpha=0.3)
    over_time.set_xlabel("epoch of unlearning")
    over_time.set_title("Above the line: no difference from a retrained model")
    against.set_xlabel("model utility")
    against.set_title("Up and right is better (the last epoch has a black rim)")
    over_time.legend()
    figure.savefig(file, dpi=130)
