"""The demo over several seeds: forget quality and utility of every method, and the time.

    python benchmarks/demo_seeds.py --seeds 0 1 2

Writes ``benchmarks/results/demo_seeds.json`` and exits with 1 where a seed misses the paper's
effect (``check_demo.py`` says what that is).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from check_demo import check

RESULT = Path(__file__).parent / "results" / "demo_seeds.json"


def run_demo(seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "npo_fast", "demo", "--json", "--seed", str(seed)]
        out = subprocess.run(
            [*command, "--output", f"{folder}/demo"], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    return json.loads(out)


def summarise(results: list[dict]) -> dict:
    rows: dict[str, dict] = {}
    for name in results[0]["models"]:
        models = [result["models"][name] for result in results]
        bases = [result["models"]["original"]["last"]["model_utility"] for result in results]
        rows[name] = {}
        for when in ("peak", "last"):
            points = [model[when] for model in models]
            shares = [p["model_utility"] / base for p, base in zip(points, bases, strict=True)]
            rows[name] |= {
                f"forget_quality_{when}": [p["forget_quality"] for p in points],
                f"model_utility_{when}": [p["model_utility"] for p in points],
                f"utility_share_{when}_mean": statistics.mean(shares),
                f"utility_share_{when}_stdev": statistics.stdev(shares) if len(shares) > 1 else 0,
            }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    results = [run_demo(seed) for seed in options.seeds]
    content = {
        "seeds": options.seeds,
        "time_s": [result["time_s"] for result in results],
        "missing": {str(r["seed"]): check(r) for r in results},
        "models": summarise(results),
        "answers": {n: m["answers"] for n, m in results[0]["models"].items()},
        "paths": {n: m["path"] for n, m in results[0]["models"].items()},
        "settings": results[0]["settings"],
        "versions": results[0]["versions"],
        "processor": platform.processor() or platform.machine(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({"time_s": content["time_s"], "missing": content["missing"]}, indent=1))
    sys.exit(any(content["missing"].values()))


if __name__ == "__main__":
    main()
