"""The demo over several seeds: forget quality and utility of every method, and the time.

    python benchmarks/demo_seeds.py --seeds 0 1 2

Writes ``benchmarks/results/demo_seeds.json`` and exits with 1 where a seed misses the paper's
effect (``check_demo.py`` says what that is).
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

from check_demo import check

from npo_fast.bench.provenance import provenance
from npo_fast.experiments.demo.experiment import Demo, DemoSettings

RESULT = Path(__file__).parent / "results" / "demo_seeds.json"


def run_demo(seed: int) -> dict:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        demo = Demo(Path(folder), seed, DemoSettings())
        return demo.describe(demo.run(), time.perf_counter() - started)


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
        "commit": provenance()["commit"],
    }
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({"time_s": content["time_s"], "missing": content["missing"]}, indent=1))
    sys.exit(any(content["missing"].values()))


if __name__ == "__main__":
    main()
