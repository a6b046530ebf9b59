"""What sharpness-aware steps buy: attacks on models that forgot with and without them.

    python benchmarks/robustness.py --seeds 0 1 2 4 11 --worlds runs/worlds

NPO+RT as in the demo with several rho (0: ordinary steps) on its world, then ``npo_fast.attack``:
relearning a fifth of the forget set, and weights rounded to 8 and 4 bits. Forget probability and
forget quality are those of the rest of the forget set. Rows go to WORLDS/robustness-SEED.jsonl as
they come, and all to benchmarks/results/robustness.json. ``forget_half.py --attack`` does the same
with a real model.
"""

import argparse
import json
import logging
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from demo_world import LOADING, SETTINGS, Rows, World

import npo_fast
from npo_fast import TrainSettings
from npo_fast.attacks.options import AttackOptions
from npo_fast.bench.provenance import provenance
from npo_fast.metrics.measures import measures
from npo_fast.runs import MethodOptions

RESULTS = Path(__file__).parent / "results"
RHOS = (0.0, 0.01, 0.03, 0.1, 0.3)
RELEARNING = TrainSettings(epochs=5, batch_size=8, lr=1e-3, micro_batch_tokens=4096)
METHOD = MethodOptions("NPO+RT", beta="auto")


def short(scores: npo_fast.Scores) -> dict[str, float]:
    """Of one attack: what comes back of the forget set, and what is left of the retain set."""
    found = measures(scores.logs)
    short = {f"{name}_probability": found[name]["probability"] for name in ("forget", "retain")}
    if "forget quality" in scores:
        short["forget_quality"] = scores["forget quality"]
    return short


def attack(model, output: Path, training: TrainSettings, **more) -> dict[str, dict[str, float]]:
    found = npo_fast.attack(
        model, output=output, attacks=AttackOptions(max_new_tokens=1), training=training, **more
    )
    return {name: short(scores) for name, scores in found.items()}


def run_seed(seed: int, worlds: Path, rhos: list[float]) -> list[dict]:
    world = World(seed, worlds)
    rows = Rows(worlds / f"robustness-{seed}.jsonl")
    for rho in rhos:
        if rows.has(seed=seed, rho=rho):
            continue
        world.unlearn(
            replace(SETTINGS.unlearning, sharpness_rho=rho), method=METHOD,
            holdout=world.dataset.holdout,
        )  # fmt: skip
        scores = world.scores()
        with tempfile.TemporaryDirectory() as folder:
            attacks = attack(
                world.student.lm, Path(folder) / "attack", replace(RELEARNING, seed=seed),
                forget=world.dataset.forget, retain=world.dataset.retain, loading=LOADING,
                tokenizer=world.student.tokenizer, retrained=world.retrained,
            )  # fmt: skip
        rows.add(seed=seed, rho=rho, **scores, attacks=attacks)
    return rows.rows


def summarise(rows: list[dict]) -> dict:
    """Means over seeds, by rho and attack."""
    return {
        f"{rho:g}": {
            name: {
                measure: statistics.mean(row["attacks"][name][measure] for row in of_rho)
                for measure in of_rho[0]["attacks"][name]
            }
            for name in of_rho[0]["attacks"]
        }
        for rho in sorted({row["rho"] for row in rows})
        if (of_rho := [row for row in rows if row["rho"] == rho])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 4, 22])
    parser.add_argument("--rhos", type=float, nargs="+", default=list(RHOS))
    parser.add_argument("--worlds", type=Path, default=Path("runs/worlds"))
    parser.add_argument("--result", type=Path, default=RESULTS / "robustness.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = []
    for seed in options.seeds:
        rows += run_seed(seed, options.worlds, options.rhos)
    content = {
        "seeds": options.seeds,
        "summary": summarise(rows),
        "rows": rows,
        **provenance(),
    }
    options.result.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
