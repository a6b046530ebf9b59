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
        bases = [result["models"]["original"]["model_utility"] for result in results]
        shares = [m["model_utility"] / base for m, base in zip(models, bases, strict=True)]
        best = [max(m["path"], key=lambda point: point["forget_quality"]) for m in models]
        rows[name] = {
            "forget_quality_best": [point["forget_quality"] for point in best],
            "epoch_of_best": [point["epoch"] for point in best],
            "forget_quality_last": [m["path"][-1]["forget_quality"] for m in models],
            "retain_probability_last": [m["path"][-1]["retain_probability"] for m in models],
            "utility_share": shares,
            "utility_share_mean": statistics.mean(shares),
            "utility_share_stdev": statistics.stdev(shares) if len(shares) > 1 else 0,
            "beta": [m["beta"] for m in models],
            "verdict": [m["verdict"]["outcome"] for m in models],
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
        "conclusions": {str(r["seed"]): r["conclusion"] for r in results},
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
