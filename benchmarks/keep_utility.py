"""--keep-utility against fixed retain coefficients, and against dual ascent as PDU has it.

    python benchmarks/keep_utility.py --seeds 11 4 22 --worlds runs/worlds

In the demo's world (rate 1e-3, 20 epochs, 100 steps) NPO+RT, GA+RT and SimNPO+RT unlearn with fixed
coefficients 0.2, 1 and 5, with --keep-utility 0.9, 0.95 and 0.99 (from coefficient 1 on), and with
the dual step of arXiv 2506.05314 on the same constraint. Rows go to WORLDS/keep_utility-SEED.jsonl
as they come, and all to benchmarks/results/keep_utility.json.
"""

import argparse
import json
import logging
import statistics
from dataclasses import replace
from pathlib import Path

from demo_world import SETTINGS, Rows, World

from npo_fast.bench.provenance import provenance
from npo_fast.runs import MethodOptions
from npo_fast.trainer import loop
from npo_fast.trainer.retain_weight import SMOOTHING, RetainWeight

RESULT = Path(__file__).parent / "results" / "keep_utility.json"
METHODS = ("NPO+RT", "GA+RT", "SimNPO+RT")
WAYS = (
    ("fixed", 0.2), ("fixed", 1.0), ("fixed", 5.0),
    ("keep", 0.9), ("keep", 0.95), ("keep", 0.99), ("dual", 0.95),
)  # fmt: skip
DUAL_STEP = 1.0  # dual_step_size of open-unlearning


class DualAscent(RetainWeight):
    """``lambda <- max(0, lambda + step (loss - bound))`` after every step, as open-unlearning."""

    @property
    def coefficient(self) -> float:
        return max(1e-6, self.start + self.integral)

    def update(self, batch, log_probs) -> None:
        smooth, coefficient = self.lost, self.coefficient
        super().update(batch, log_probs)
        lost = smooth + (self.lost - smooth) / SMOOTHING  # of this step alone
        raised = coefficient + DUAL_STEP * (lost - self.tolerance)
        self.integral = max(0.0, raised) - self.start


def run(world: World, rows: Rows, seed: int, method: str, way: str, value: float) -> None:
    """One row, if it is not there yet."""
    key = {"seed": seed, "method": method, "way": way, "value": value}
    if rows.has(**key):
        return
    training = SETTINGS.unlearning
    if way != "fixed":
        training = replace(training, keep_utility=value)
    loop.RetainWeight = DualAscent if way == "dual" else RetainWeight
    coefficient = value if way == "fixed" else 1.0
    final = world.unlearn(training, method=MethodOptions(method, retain_coefficient=coefficient))
    rows.add(**key, coefficient=final.get("retain_coefficient", coefficient), **world.scores())


def summarise(rows: list[dict]) -> dict:
    """Mean and extremes over seeds, by method and way."""
    cells: dict[str, list[dict]] = {}
    for row in rows:
        cells.setdefault(f"{row['method']} {row['way']} {row['value']:g}", []).append(row)
    names = ("kept", "forget_quality", "forget_probability", "coefficient")
    return {
        cell: {
            name: {
                "mean": statistics.mean(row[name] for row in of_cell),
                "least": min(row[name] for row in of_cell),
                "most": max(row[name] for row in of_cell),
            }
            for name in names
        }
        for cell, of_cell in sorted(cells.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 4, 22])
    parser.add_argument("--worlds", type=Path, default=Path("runs/worlds"))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = []
    for seed in options.seeds:
        world = World(seed, options.worlds)
        found = Rows(options.worlds / f"keep_utility-{seed}.jsonl")
        for way, value in WAYS:
            for method in METHODS:
                run(world, found, seed, method, way, value)
        rows += found.rows
    content = {
        "seeds": options.seeds,
        "summary": summarise(rows),
        "rows": rows,
        **provenance(),
    }
    options.result.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
