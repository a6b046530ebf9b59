"""The picture at the top of the README: forgetting against utility, ten seeds of the demo's world.

    python benchmarks/overview.py

Reads ``benchmarks/results/beta.json`` (``benchmarks/beta.py`` makes it) and draws
``docs/images/forgetting.png``, readable at the width of a phone.
"""

import json
import statistics
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
FORMS = {  # of beta.json: label, colour (Okabe and Ito), marker, where the label stands
    "NPO+RT, beta by holdout": ("NPO+RT,\n--beta auto", "#0072B2", "o", (107, 1.0), "left"),
    "SimNPO+RT": ("SimNPO+RT", "#D55E00", "D", (107, 0.02), "left"),
    "NPO+RT, beta 0.1": ("NPO+RT,\nbeta 0.1", "#8A4F9E", "s", (72, 5e-5), "center"),
    "GA+RT": ("GA+RT", "#444444", "X", (28, 1e-5), "center"),
}
SAME = 0.05  # above this p-value the test sees no difference


def main() -> None:
    seeds = json.loads((HERE / "results/beta.json").read_text())["seeds"]
    plt.rcParams.update({"font.size": 19, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(9, 7), dpi=100)
    axes.axhspan(SAME, 2, color="#009E73", alpha=0.12, linewidth=0)
    axes.axhline(SAME, color="#009E73", linestyle="--", linewidth=2)
    axes.text(2, 0.62, "as if never taught", color="#006B4F", va="center")
    for form, (label, colour, marker, place, side) in FORMS.items():
        ends = [
            (100 * seed["forms"][form]["path"][-1]["model_utility"] / seed["utility"],
             seed["forms"][form]["path"][-1]["forget_quality"])
            for seed in seeds.values()
        ]  # fmt: skip
        kept, forgotten = zip(*ends, strict=True)
        axes.scatter(kept, forgotten, s=130, color=colour, marker=marker, edgecolor="white")
        passed = sum(p > SAME for p in forgotten)
        text = f"{label}\n{passed} of {len(ends)}"
        axes.text(*place, text, color=colour, ha=side, va="top", fontweight="bold", linespacing=1.1)
        print(form, f"{passed} of {len(ends)}, utility {statistics.median(kept):.0f} %")
    axes.set(yscale="log", xlim=(0, 150), ylim=(8e-8, 2))
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlabel("model utility kept, %  (right is better)")
    axes.set_ylabel("forget quality, p  (up is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs/images/forgetting.png")


if __name__ == "__main__":
    main()
