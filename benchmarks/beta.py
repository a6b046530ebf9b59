"""Where forgetting stops: ``--beta auto`` against a fixed beta, other forms, GA+RT and SimNPO+RT.

    python benchmarks/beta.py --seeds 0 1 2 3 4 5 6 7 11 22
    python benchmarks/beta.py --seeds 36 --authors 80 --forms "NPO+RT, beta by holdout" SimNPO
    python benchmarks/beta.py --smollm2 --tofu FOLDER_OR_HUB_NAME --seeds 3

On the world of ``npo-fast demo`` (20 epochs at 1e-3), and with ``--smollm2`` on six authors of TOFU
that SmolLM2-135M was taught, of whom three are forgotten (``--epochs``, batch 10). The retain
coefficient is 1. Each form is measured as it goes, and stands in
``benchmarks/results/beta.json``, ``beta_sizes.json`` (``--authors``, ``--forget-share``) or
``beta_smollm2.json``. A seed that is there is not repeated.
"""

import argparse
import json
import logging
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from smollm2_tofu import find_smollm2
from torch import Tensor

import npo_fast
from npo_fast import ModelOptions, RunOptions, TrainSettings, metrics, suggest_beta
from npo_fast.bench.provenance import provenance
from npo_fast.data import Record, Template, load_records, load_refusals, refused
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import tofu_suite
from npo_fast.experiments.demo.experiment import LOADING, DemoSettings, Student
from npo_fast.experiments.demo.tiny_model import weights as weights_of
from npo_fast.losses.base import OfSequence, log_sigmoid_penalty
from npo_fast.methods import Coefficients, Term, build_method
from npo_fast.metrics.measures import measures
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.load import load_model, load_tokenizer
from npo_fast.model.reference_log_probs import reference_log_probs_of
from npo_fast.ops import Reference
from npo_fast.trainer.loop import reference_log_probs, train

RESULTS = Path(__file__).parent / "results"
TAUGHT, KEPT, FORGOTTEN = "forget05[80:]", "forget05[80:140]", "forget05[140:]"
NEVER_SEEN = "forget10[:40]"  # other authors: held out
NATS = math.log(19)  # where 10 % of NPO's weight is left, times beta


@dataclass(frozen=True)
class PerLength(OfSequence):
    """NPO with the beta ``beta / |y_i|``: each sequence spends its weight at its own level."""

    beta: float
    reference: ClassVar[Reference] = "sequence"

    def value_and_slope(self, r: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        beta = self.beta / tokens
        value, slope = log_sigmoid_penalty(beta * r, 1.0)
        return value / beta, slope


class World:
    """A model that knows what is to be forgotten, a retrained one, and the data."""

    lm: CausalLM
    template: Template
    micro_batch_tokens = 4096

    def __init__(
        self, weights: dict[str, dict[str, Tensor]], suite: dict[str, list[Record]],
        records: dict[str, list[Record]], settings: TrainSettings, looks: tuple[int, ...],
        tokens: int,
    ) -> None:  # fmt: skip
        self.weights, self.suite, self.settings, self.looks = weights, suite, settings, looks
        self.tokens = tokens
        records["idk"] = refused(records["forget"], load_refusals(None, None), settings.seed)
        self.examples = {n: self.template.encode_all(rows)[0] for n, rows in records.items()}
        self.known, self.retrained, self.base = (
            self._log_probs(name, "forget") for name in ("original", "retrained", "base")
        )
        held_out = self._log_probs("original", "holdout") / self._lengths("holdout")
        self.holdout = held_out.quantile(0.5) * self._lengths("forget")
        self._load("retrained")
        self.logs = self._evaluate(True)

    def forms(self) -> dict[str, tuple[tuple[Term, ...], Tensor]]:
        """Terms by name, and what the forget term compares with."""
        levels = {"retrained": self.retrained, "holdout": self.holdout, "base": self.base}
        betas = {name: suggest_beta(self.known, level) for name, level in levels.items()}

        def method(name: str, beta: float | None = None) -> tuple[Term, ...]:
            return build_method(name, Coefficients(beta=beta, retain=1.0))

        def with_loss(loss: Any) -> tuple[Term, ...]:
            npo, retain = method("NPO+RT")
            return replace(npo, loss=loss), retain

        rate = float(self.holdout.median() / self._lengths("forget").median())
        forms = {f"NPO+RT, beta by {name}": method("NPO+RT", b) for name, b in betas.items()}
        forms |= {
            "NPO+RT, twice that beta": method("NPO+RT", 2 * betas["holdout"]),
            "NPO+RT, beta 0.1": method("NPO+RT", 0.1),
            "NPO+RT, a beta a length": with_loss(PerLength(-NATS / rate)),
            "DPO+RT, beta by holdout": method("DPO+RT", betas["holdout"]),
            "DPO+RT, beta by holdout and refusals": method("DPO+RT", self._with_refusals()),
            "KTO+RT, beta by holdout": method("KTO+RT", betas["holdout"]),
            "SimNPO+RT": method("SimNPO+RT"),
            "GA+RT": method("GA+RT"),
        }
        made = {name: (terms, self.known) for name, terms in forms.items()}
        # the pull fades around the level itself, whatever the model before said
        made["NPO+RT to the level"] = (method("NPO+RT", 1.0), self.holdout + NATS)
        return made

    def _with_refusals(self) -> float:
        """Of DPO: its margin grows by what the refusal gains, too, at most to certainty."""
        gained = -float(self._log_probs("original", "idk").median())
        return NATS / (float(self.known.median() - self.holdout.median()) + gained)

    def run(self, terms: tuple[Term, ...], compared: Tensor) -> dict[str, Any]:
        """Trains, and measures at the looks and at the end."""
        self._load("original")
        tokens = self.settings.micro_batch_tokens
        references = reference_log_probs(self.lm, self.examples, terms, tokens)
        if "forget" in references and compared is not self.known:
            references["forget"] = compared
        path, started = [], time.perf_counter()
        for record in train(self.lm, self.examples, terms, self.settings, references):
            epoch = round(record.epoch)
            if abs(record.epoch - epoch) > 1e-9 or epoch not in self.looks:
                continue
            path.append({"epoch": epoch, **self._scores(epoch == self.looks[-1])})
            self.lm.model.train()
        now = self._log_probs(None, "forget")
        level = float(self.holdout.median())
        known = float(self.known.median())
        return {
            "beta": getattr(terms[0].loss, "beta", None),
            "gone": (known - float(now.median())) / (known - level),
            "path": path,
            "time_s": time.perf_counter() - started,
        }

    def levels(self) -> dict[str, float]:
        """Median log-probs of a forget answer."""
        names = ("known", "retrained", "holdout", "base")
        return {name: float(getattr(self, name).median()) for name in names}

    def utility(self) -> float:
        """Of the original model."""
        self._load("original")
        return metrics.model_utility(self._evaluate(True))

    def _scores(self, last: bool) -> dict[str, float]:
        logs = self._evaluate(last)
        found = measures(logs, self.logs)
        return {
            "forget_quality": found["forget_quality"],
            "forget_probability": found["forget"]["probability"],
            "retain_probability": found["retain"]["probability"],
            **({"model_utility": found["model_utility"]} if last else {}),
        }

    def _evaluate(self, whole: bool) -> metrics.Result:
        names = self.suite if whole else (metrics.FORGET, metrics.RETAIN)
        settings = EvaluationSettings(
            generate=whole, max_new_tokens=self.tokens, generation_batch=256
        )
        return evaluate(
            self.lm, self.template, {name: self.suite[name] for name in names}, settings
        )

    def _log_probs(self, model: str | None, source: str) -> Tensor:
        if model is not None:
            self._load(model)
        examples = {source: self.examples[source]}
        found = reference_log_probs_of(self.lm, examples, self.micro_batch_tokens)
        return found[source].sequences.clone()

    def _lengths(self, source: str) -> Tensor:
        return torch.tensor([float(example.answer_length) for example in self.examples[source]])

    def _load(self, name: str) -> None:
        self.lm.model.load_state_dict(self.weights[name])


class DemoWorld(World):
    """That of ``npo-fast demo``."""

    def __init__(self, seed: int, settings: DemoSettings) -> None:
        data = settings.dataset(seed)
        student = Student(data.texts(), seed)
        self.lm = student.lm
        self.template = Template(student.tokenizer, LOADING.template, LOADING.max_length)
        with TemporaryDirectory() as folder:
            weights = student.teach(data, settings, Path(folder))
        weights["base"] = weights.pop("pretrained")
        suite = data.kept() | {metrics.FORGET: data.forget}
        records = {"forget": data.forget, "retain": data.retain, "holdout": data.holdout}
        how = replace(settings.unlearning, seed=seed)
        super().__init__(weights, suite, records, how, (4, 10, 20), 24)


class SmolLM2World(World):
    """Six authors of TOFU, of whom three are forgotten; models are kept in ``runs``."""

    def __init__(self, seed: int, tofu: str, runs: Path, lr: float, epochs: int) -> None:
        base = find_smollm2()
        options = ModelOptions(template="plain", dtype="fp32")
        for name, split in (("original", TAUGHT), ("retrained", KEPT)):
            if not (runs / str(seed) / name / "model").exists():
                npo_fast.finetune(
                    base, train=split, data=tofu, output=runs / str(seed) / name, loading=options,
                    training=TrainSettings(epochs=8, lr=1e-4, batch_size=8, seed=seed),
                    run=RunOptions(overwrite=True),
                )  # fmt: skip
        places = {
            "base": base,
            "retrained": str(runs / str(seed) / "retrained"),
            "original": str(runs / str(seed) / "original"),
        }
        models = {name: load_model(place, dtype="fp32") for name, place in places.items()}
        weights = {name: weights_of(lm) for name, lm in models.items()}
        self.lm = models["original"]
        self.template = Template(load_tokenizer(places["original"]), "plain", 512)
        suite = tofu_suite(tofu, FORGOTTEN, KEPT)
        suite = {
            name: rows if name == metrics.FORGET else rows[:20] for name, rows in suite.items()
        }
        names = {"forget": FORGOTTEN, "retain": KEPT, "holdout": NEVER_SEEN}
        records = {name: load_records(split, tofu) for name, split in names.items()}
        how = TrainSettings(epochs=epochs, lr=lr, batch_size=10, seed=seed)
        looks = (round(epochs / 4), round(epochs / 1.6), epochs)
        super().__init__(weights, suite, records, how, looks, 48)


def table(seeds: dict[str, Any]) -> str:
    """In Markdown: what each form ends with, over the seeds that it ran on."""
    lines = [
        "| form | seeds | beta | forget quality at the end | utility at the end | times the way |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for seed in seeds.values() for name in seed["forms"]):
        having = {key: seed for key, seed in seeds.items() if name in seed["forms"]}
        of = [(seed["forms"][name], seed["utility"]) for seed in having.values()]
        ends = [form["path"][-1] for form, _ in of]
        betas = [form["beta"] for form, _ in of]
        between = "" if betas[0] is None else f"{min(betas):.2g} – {max(betas):.2g}"
        shares = [end["model_utility"] / u for end, (_, u) in zip(ends, of, strict=True)]
        cells = [
            name, "; ".join(having), between,
            ", ".join(f"{end['forget_quality']:.2g}" for end in ends),
            f"{statistics.mean(shares):.0%} ({min(shares):.0%} – {max(shares):.0%})",
            f"{min(f['gone'] for f, _ in of):.1f} – {max(f['gone'] for f, _ in of):.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--authors", type=int, default=DemoSettings.authors, help="of the demo")
    parser.add_argument("--forget-share", type=float, default=DemoSettings.forget_share)
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--tofu", default="locuslab/TOFU")
    parser.add_argument("--lr", type=float, default=6e-5, help="of SmolLM2")
    parser.add_argument("--epochs", type=int, default=8, help="of SmolLM2's unlearning")
    parser.add_argument("--runs", type=Path, default=Path("runs/beta"))
    parser.add_argument(
        "--forms", nargs="*", help="parts of the names of the forms to run; none: models are made"
    )
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    sizes = DemoSettings(authors=options.authors, forget_share=options.forget_share)
    other = "" if sizes == DemoSettings() else f", {sizes.authors} authors, {sizes.forget_share:g}"
    if options.smollm2 and other:
        parser.error("--authors and --forget-share are of the demo's world: not with --smollm2")
    name = "beta_smollm2" if options.smollm2 else "beta_sizes" if other else "beta"
    file = options.result or RESULTS / f"{name}.json"
    content = json.loads(file.read_text()) if file.exists() else {"seeds": {}}
    for seed in options.seeds:
        key = f"{seed}{other}"
        if key in content["seeds"] and options.forms is None:
            continue
        world: World
        if options.smollm2:
            world = SmolLM2World(seed, options.tofu, options.runs, options.lr, options.epochs)
        else:
            world = DemoWorld(seed, sizes)
        if key not in content["seeds"]:
            known = {"levels": world.levels(), "utility": world.utility(), "forms": {}}
            content["seeds"][key] = known
        known = content["seeds"][key]
        for form, (terms, compared) in world.forms().items():
            if options.forms is not None and not any(part in form for part in options.forms):
                continue
            known["forms"][form] = world.run(terms, compared)
            end = known["forms"][form]["path"][-1]
            print(seed, form, json.dumps(end), flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({**content, **provenance()}, indent=1) + "\n")
    print(table(content["seeds"]))


if __name__ == "__main__":
    main()
