"""What `--retain auto` is worth beside real retain data, in the demo's small world.

    python benchmarks/retain_auto.py --seeds 0 1 2
    python benchmarks/retain_auto.py --seeds 0 --rmu        RMU beside them, with real retain data

For each seed: the model before, NPO+RT with the real retain set, NPO+RT with the model's own
answers, NPO without retain data. Forget quality and model utility at the end, in one result file.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from npo_fast import metrics
from npo_fast.bench.provenance import provenance
from npo_fast.experiments.demo.experiment import LOADING, Demo, DemoSettings
from npo_fast.methods import Coefficients
from npo_fast.runs import MethodOptions, ReportOptions, unlearn

RESULT = Path(__file__).resolve().parent / "results/retain_auto.json"
NPO = Coefficients(beta=0.4, retain=1.0)
ARMS = {"NPO+RT, retain": ("NPO+RT", True), "NPO+RT, auto": ("NPO+RT", "auto"),
        "NPO, none": ("NPO", None)}  # fmt: skip


def world(folder: Path, seed: int) -> tuple[Demo, dict[str, Any]]:
    """The demo with its retrained logs, and the weights of the model that is to forget."""
    demo = Demo(folder, seed, DemoSettings())
    taught = demo.student.teach(demo.dataset, demo.settings, folder)
    demo.student.lm.model.load_state_dict(taught["retrained"])
    demo.retrained = demo._evaluate("retrained")
    demo.student.lm.model.load_state_dict(taught["original"])
    return demo, taught["original"]


def measure(demo: Demo, name: str) -> dict[str, float]:
    """Forget quality and model utility of the model as it is."""
    logs = demo._evaluate(name)
    quality = metrics.forget_quality(logs, demo.retrained)
    return {"forget_quality": quality, "model_utility": metrics.model_utility(logs)}


def run_seed(folder: Path, seed: int, arms: dict[str, tuple[str, Any]], epochs: int) -> Any:
    """The measures of the model before and of every arm."""
    demo, original = world(folder, seed)
    found = {"before": measure(demo, "before")}
    for name, (method, retain) in arms.items():
        demo.student.lm.model.load_state_dict(original)
        kept = {True: demo.dataset.retain, None: None}.get(retain, retain)
        unlearn(
            demo.student.lm, forget=demo.dataset.forget, retain=kept,
            tokenizer=demo.student.tokenizer, loading=LOADING,
            method=MethodOptions.of(method, NPO.for_method(method)) if method != "RMU" else method,
            training=replace(demo.settings.unlearning, seed=seed, epochs=epochs),
            report=ReportOptions(no_report=True), output=folder / name.replace(" ", "-"),
        )  # fmt: skip
        found[name] = measure(demo, f"{name}/eval")
        print(seed, name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rmu", action="store_true", help="RMU with real retain data too")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    arms = {**ARMS, **({"RMU, retain": ("RMU", True)} if arguments.rmu else {})}
    seeds = {}
    for seed in arguments.seeds:
        with TemporaryDirectory() as folder:
            seeds[seed] = run_seed(Path(folder), seed, arms, arguments.epochs)
        content = {**provenance(), "epochs": arguments.epochs,
                   "coefficients": NPO.given(), "seeds": seeds}  # fmt: skip
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
