"""Growth of time and peak memory with rows and vocabulary, ours beside plain PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from npo_fast.bench.candidates import OURS, find_candidates
from npo_fast.bench.inputs import Shape
from npo_fast.bench.loss import bench

POINTS = 6
MOST_ROWS, MOST_VOCABULARY = 16384, 262144
FIXED_ROWS, FIXED_VOCABULARY = 1024, 49152  # while the other one grows
TOKENS_PER_SEQUENCE = 64


@dataclass(frozen=True)
class Point:
    """Measurements of one candidate at one size."""

    peer: str
    axis: str  # "rows" or "vocabulary"
    rows: int
    vocabulary: int
    train_ms: float
    train_peak_mib: float | None


def halves(most: int) -> list[int]:
    """``most`` and its halves, smallest first."""
    return [most >> i for i in reversed(range(POINTS)) if most >> i]


def scaling(
    width: int,
    most_rows: int,
    most_vocabulary: int,
    rounds: int,
    device: torch.device,
    log: Callable[[str], None],
) -> list[Point]:
    """Measures NPO with gradients in fp32 on random inputs; plain PyTorch while its logits fit."""
    vocabulary = min(FIXED_VOCABULARY, most_vocabulary)
    rows = min(FIXED_ROWS, most_rows)
    sizes = [("rows", n, vocabulary) for n in halves(most_rows)]
    sizes += [("vocabulary", rows, v) for v in halves(most_vocabulary)]
    npo = [c for c in find_candidates(device, ["plain"])[0] if c.loss == "NPO"]
    points = []
    for axis, n, v in sizes:
        sequences = max(1, n // TOKENS_PER_SEQUENCE)
        shape = Shape(f"N={n} V={v}", n, width, v, sequences)
        result = bench(shape, npo, ["random"], rounds, device, log)
        for name, why in result.refused.items():
            log(f"{shape.name}: {name} left out: {why}")
        for row in result.rows:
            points.append(Point(row.peer, axis, n, v, row.train_ms, row.train_peak_mib))
    return points


def plot(points: Sequence[Point], file: Path) -> None:
    """Plots both sweeps side by side, time above and memory below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col")
    labels = {"rows": "tokens with a loss (N)", "vocabulary": "vocabulary (V)"}
    measures = {"train_ms": "loss and gradients, ms", "train_peak_mib": "peak beyond outputs, MiB"}
    for column, (axis, xlabel) in enumerate(labels.items()):
        for row, (field, ylabel) in enumerate(measures.items()):
            axes = grid[row][column]
            for peer, style in ((OURS, "o-C0"), ("plain", "s--C1")):
                line = [vars(p) for p in points if p.axis == axis and p.peer == peer]
                line = [p for p in line if p[field] is not None]
                name = "plain PyTorch" if peer == "plain" else peer
                axes.plot([p[axis] for p in line], [p[field] for p in line], style, label=name)
            axes.set_xscale("log", base=2)
            axes.set(yscale="log", ylabel=ylabel)
            axes.grid(alpha=0.3)
        grid[1][column].set_xlabel(xlabel)
    grid[0][0].legend()
    figure.savefig(file, dpi=130)
