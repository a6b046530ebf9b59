"""A figure of unlearning runs as a PNG file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from npo_fast.metrics.evidence import MEANINGFUL


@dataclass(frozen=True)
class Point:
    """One evaluation of an unlearning run."""

    epoch: int
    forget_quality: float
    retain_probability: float


def plot_unlearning(
    paths: Mapping[str, Sequence[Point]],
    retrained: Point,
    file: Path,
) -> None:
    """Plots forget quality and the probability of retain answers over the epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    least = 1e-8  # points below it are drawn there
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    quality, kept = figure.subplots(1, 2)
    for i, (name, points) in enumerate(paths.items()):
        style = {"color": f"C{i}", "marker": "os^Dvp"[i % 6], "markersize": 4, "label": name}
        epochs = [point.epoch for point in points]
        quality.plot(epochs, [max(point.forget_quality, least) for point in points], **style)
        kept.plot(epochs, [point.retain_probability for point in points], **style)
    quality.axhline(MEANINGFUL, color="grey", linestyle="--", linewidth=1)
    quality.set(yscale="log", ylim=(least, 1), ylabel="forget quality (p-value)")
    quality.set_title("Above the line: no difference from the retrained model")
    kept.axhline(retrained.retain_probability, color="grey", linestyle="--", linewidth=1)
    kept.set(ylim=(0, 1.02), ylabel="probability of retain answers")
    kept.set_title("What was to be kept (line: the retrained model)")
    for axes in (quality, kept):
        axes.set_xlabel("epoch of unlearning")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    kept.legend()
    figure.savefig(file, dpi=130)
