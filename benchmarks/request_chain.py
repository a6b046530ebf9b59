"""Requests that keep coming: what the first ones forgot, and what is kept, after ten of them.

    python benchmarks/request_chain.py --seeds 0 1 2
    python benchmarks/request_chain.py --smollm2 --tofu FOLDER_OR_HUB_NAME --seeds 0

The demo's small model learns 50 authors, and is asked ten times to forget two of them. Each run
starts from the model of the run before and retains all authors that nobody has asked for by then.
``--smollm2`` does the same with SmolLM2-135M: six authors of TOFU, three requests of one author.
After each request: the probability of the answers of every request so far, the forget quality of
all of them together and the model utility. They are compared with one model that was retrained
without any of the requests. ``NPO+RT@first`` has the model before the first request as reference.
NPO's beta is 0.4 in the small model, that of ``--beta auto`` by authors never taught in SmolLM2,
whose retain coefficient and rate are those of ``forget_half.py``.

Puts its numbers into ``benchmarks/results/request_chain.json`` (``request_chain_smollm2.json``)
beside those of other seeds and methods there, and draws the methods that all seeds have.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import npo_fast
from npo_fast import EvaluationSettings, MethodOptions, ModelOptions, TrainSettings, metrics
from npo_fast.bench.provenance import provenance
from npo_fast.data import Record, Template, load_records
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.suite import tofu_suite
from npo_fast.experiments.demo.experiment import LOADING, DemoSettings, Student
from npo_fast.methods import METHODS
from npo_fast.model.load import load_model, load_tokenizer
from npo_fast.runs.options import ReportOptions, RunOptions

RESULTS = Path(__file__).parent / "results"
REQUESTS, AUTHORS_A_REQUEST = 10, 2
DEMO = DemoSettings(authors=50, forget_share=REQUESTS * AUTHORS_A_REQUEST / 50)
UTILITY_RECORDS = 20  # of each set that makes the model utility
VARIANTS = ("NPO+RT", "NPO+RT@first", "SimNPO+RT", "RMU")


@dataclass(frozen=True)
class World:
    """A taught model, and what it is asked to forget, request by request."""

    original: Path  # run folders
    retrained: Path  # without any of the requests
    requests: list[list[Record]]
    kept: list[Record]
    utility: dict[str, list[Record]]  # sets by the name of their log
    training: TrainSettings
    loading: ModelOptions
    evaluation: EvaluationSettings
    beta: float | str  # of NPO
    retain_coefficient: float  # of NPO and SimNPO
    holdout: list[Record] | None = None  # for a beta that is "auto"

    def options(self, method: str, reference: str) -> MethodOptions:
        found: dict[str, Any] = {"beta": self.beta} if method.startswith("NPO") else {}
        if method.endswith("+RT"):
            found["retain_coefficient"] = self.retain_coefficient
        return MethodOptions(method, reference=reference or None, **found)

    def measure(self, model: Path, forgotten: int, retrained: metrics.Result | None) -> dict:
        """What the model knows after the first ``forgotten`` requests."""
        lm = load_model(str(model), dtype=self.loading.dtype)
        template = Template(
            load_tokenizer(str(model)), self.loading.template, self.loading.max_length
        )
        everything = {metrics.FORGET: [r for request in self.requests for r in request]}
        settings = replace(self.evaluation, generate=False)
        asked = evaluate(lm, template, everything, settings)[metrics.FORGET]
        log = evaluate(lm, template, self.utility, self.evaluation)
        so_far = sum(len(request) for request in self.requests[:forgotten] or self.requests)
        together = {metrics.FORGET: first_records(asked, so_far)}
        numbers = {
            "probability": list(self._probabilities(asked)),
            "utility": metrics.model_utility(log),
            "kept probability": statistics.mean(probabilities(log[metrics.RETAIN])),
        }
        if retrained is not None:
            other = {metrics.FORGET: first_records(retrained[metrics.FORGET], so_far)}
            numbers["forget quality"] = metrics.forget_quality(together, other)
        return {"numbers": numbers, "log": together}

    def _probabilities(self, log: dict[str, Any]) -> Iterator[float]:
        """The mean probability of the answers of each request."""
        values, start = probabilities(log), 0
        for request in self.requests:
            yield statistics.mean(values[start : start + len(request)])
            start += len(request)


def probabilities(log: dict[str, Any]) -> list[float]:
    return metrics.probability(log).tolist()


def first_records(log: dict[str, Any], count: int) -> dict[str, Any]:
    return metrics.select(log, range(count))


def demo_world(folder: Path, seed: int) -> World:
    """Fifty made-up authors in a model of 0.7 million parameters."""
    dataset = DEMO.dataset(seed)
    if not (folder / "original/model").exists():  # the last one to be taught
        Student(dataset.texts(), seed).teach(dataset, DEMO, folder)
    size = len(dataset.forget) // REQUESTS
    return World(
        folder / "original", folder / "retrained",
        [dataset.forget[i * size : (i + 1) * size] for i in range(REQUESTS)],
        dataset.retain, dataset.kept(UTILITY_RECORDS),
        TrainSettings(epochs=30, lr=1e-3, batch_size=size, micro_batch_tokens=4096, seed=seed),
        LOADING, EvaluationSettings(generation_batch=256, max_new_tokens=24), beta=0.4,
        retain_coefficient=1.0,
    )  # fmt: skip


def smollm2_world(folder: Path, seed: int, tofu: str) -> World:
    """Six authors of TOFU in SmolLM2-135M: three are forgotten, one a request."""
    from smollm2_tofu import find_smollm2

    loading = ModelOptions(template="plain", dtype="fp32")
    for name, split in (("retrained", "forget05[80:140]"), ("original", "forget05[80:]")):
        if not (folder / name / "model").exists():
            npo_fast.finetune(
                find_smollm2(), train=split, data=tofu, output=folder / name, loading=loading,
                training=TrainSettings(epochs=8, lr=1e-4, batch_size=8, seed=seed),
                run=RunOptions(overwrite=True),
            )  # fmt: skip
    suite = tofu_suite(tofu, "forget05[140:]", "forget05[80:140]")
    forget = suite.pop(metrics.FORGET)
    utility = {name: records[:20] for name, records in suite.items()}
    return World(
        folder / "original", folder / "retrained", [forget[i : i + 20] for i in (0, 20, 40)],
        load_records("forget05[80:140]", tofu, "retain", "last"), utility,
        TrainSettings(epochs=8, lr=1.8e-4, batch_size=10, seed=seed),
        loading, EvaluationSettings(generation_batch=60, max_new_tokens=48), beta="auto",
        retain_coefficient=5.0, holdout=load_records("forget10[:40]", tofu, "holdout", "last"),
    )  # fmt: skip


def run_variant(world: World, variant: str, folder: Path, retrained: metrics.Result) -> list[dict]:
    """The numbers after each request."""
    method, _, reference = variant.partition("@")
    options = world.options(method, reference)
    model, numbers = world.original, []
    for number, forget in enumerate(world.requests, 1):
        later = [record for request in world.requests[number:] for record in request]
        output = folder / f"{variant}-{number}"
        npo_fast.unlearn(
            model, forget=forget, retain=world.kept + later, output=output, method=options,
            loading=world.loading, training=world.training,
            holdout=world.holdout if options.auto_beta else None,
            report=ReportOptions(no_report=True), run=RunOptions(overwrite=True),
        )  # fmt: skip
        numbers.append(world.measure(output, number, retrained)["numbers"])
        model = output
    return numbers


def run_seed(world: World, variants: list[str], folder: Path) -> dict[str, Any]:
    retrained = world.measure(world.retrained, 0, None)
    original = world.measure(world.original, 0, retrained["log"])
    result = {"retrained": retrained["numbers"], "original": original["numbers"], "after": {}}
    for variant in variants:
        result["after"][variant] = run_variant(world, variant, folder, retrained["log"])
        print(variant, summary_of([result], variant))
    return result


def summary_of(seeds: list[dict], variant: str) -> dict[str, Any]:
    """Mean and standard deviation over seeds, after the first, middle and last request."""
    last = len(seeds[0]["after"][variant])
    rows: dict[str, Any] = {}
    for number in sorted({1, (last + 1) // 2, last}):
        found: dict[str, list[float]] = {}
        for seed in seeds:
            after = seed["after"][variant][number - 1]
            values = {
                "forget quality of all so far": after["forget quality"],
                "utility / original's": after["utility"] / seed["original"]["utility"],
                "P(kept)": after["kept probability"],
                "P(request 1)": after["probability"][0],
                "P(newest request)": after["probability"][number - 1],
                "P(all so far)": statistics.mean(after["probability"][:number]),
                "P(request 1), retrained": seed["retrained"]["probability"][0],
            }
            if later := after["probability"][number:]:
                values["P(not yet asked for)"] = statistics.mean(later)
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        rows[f"after {number}"] = {
            name: [round(statistics.mean(v), 4), round(statistics.stdev(v), 4) if v[1:] else 0]
            for name, v in found.items()
        }
    return rows


def plot(seeds: list[dict], variants: list[str], file: Path) -> None:
    """A panel a variant: one curve a request, its probability after this and later requests."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(3.4 * len(variants), 5.6), layout="constrained")
    panels = figure.subplots(2, len(variants), sharex=True, sharey="row", squeeze=False)
    level = statistics.mean(p for seed in seeds for p in seed["retrained"]["probability"])
    for (above, below), variant in zip(panels.T, variants, strict=True):
        after = [seed["after"][variant] for seed in seeds]
        count = len(after[0])
        for i in range(count):
            numbers = range(i + 1, count + 1)
            values = [[run[n - 1]["probability"][i] for run in after] for n in numbers]
            means = [statistics.mean(v) for v in values]
            errors = [statistics.stdev(v) if v[1:] else 0.0 for v in values]
            color = (0.9 * i / count, 0.3, 1 - 0.9 * i / count)
            above.errorbar(numbers, means, errors, marker="o", markersize=3, capsize=2, color=color)
        above.axhline(level, color="grey", linestyle="--", linewidth=1)
        above.set(title=variant, yscale="log")
        numbers = range(1, count + 1)
        for name, key, base in (
            ("utility", "utility", "original"),
            ("P(kept)", "kept probability", None),
        ):
            values = [
                [
                    run[n - 1][key] / (s[base][key] if base else 1)
                    for run, s in zip(after, seeds, strict=True)
                ]
                for n in numbers
            ]
            below.errorbar(
                numbers, [statistics.mean(v) for v in values],
                [statistics.stdev(v) if v[1:] else 0.0 for v in values], label=name, capsize=2,
            )  # fmt: skip
        below.set(xlabel="requests so far", ylim=(0, 1.05))
        below.grid(alpha=0.3)
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0][0].set_ylabel("P(answer) of each request\n(dashed: retrained)")
    panels[1][0].set_ylabel("share of the original's")
    panels[1][0].legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2],
        help="none: the summary and the figure of what is there",
    )  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS))
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--tofu", default="locuslab/TOFU")
    parser.add_argument("--runs", type=Path, help="keeps the runs here")
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if unknown := [v for v in options.methods if v.partition("@")[0] not in METHODS]:
        parser.error(f"--methods: no such method: {', '.join(unknown)}")
    name = "request_chain_smollm2" if options.smollm2 else "request_chain"
    file = options.result or RESULTS / f"{name}.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    results = content.get("results", {})
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            started = time.perf_counter()
            folder = (options.runs or Path(temporary)) / f"seed-{seed}"
            make = smollm2_world if options.smollm2 else demo_world
            world = make(folder, seed, *([options.tofu] if options.smollm2 else []))
            earlier = results.get(str(seed), {}).get("after", {})
            found = run_seed(world, options.methods, folder)
            after = {**earlier, **found["after"]}
            results[str(seed)] = {**found, "after": after, **provenance()}
            how = {"beta": world.beta, "retain_coefficient": world.retain_coefficient}
            content |= {"training": vars(world.training), "options": how}
            print(f"seed {seed}: {time.perf_counter() - started:.0f} s")
    seeds = list(results.values())
    complete = [v for v in seeds[0]["after"] if all(v in seed["after"] for seed in seeds)]
    content |= {
        "summary (mean, standard deviation)": {v: summary_of(seeds, v) for v in complete},
        "results": results,  # by seed
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, default=str) + "\n")
    plot(seeds, complete, file.with_suffix(".png"))
    print(json.dumps(content["summary (mean, standard deviation)"], indent=1))


if __name__ == "__main__":
    main()
