"""The demo: teach, retrain, unlearn half, measure. Small enough to watch."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from npo_fast import metrics
from npo_fast.data import Record, Template
from npo_fast.evaluation.evaluate import evaluate as evaluate_suite
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.experiments.demo.dataset import AuthorDataset, make_dataset
from npo_fast.experiments.demo.tiny_model import new_model, train_tokenizer, weights
from npo_fast.methods import Coefficients
from npo_fast.model.causal_lm import CausalLM
from npo_fast.reports.figures import Point, plot_unlearning
from npo_fast.runs import Callback, MethodOptions, ModelOptions, ReportOptions, finetune, unlearn
from npo_fast.runs.callbacks import Training
from npo_fast.trainer.settings import StepRecord, TrainSettings
from npo_fast.versions import versions

METHODS = ("GA", "GA+RT", "NPO", "NPO+RT")
COMMON_REPEATS = 3  # famous authors and countries are seen more often than the background
LOADING = ModelOptions(template="plain", max_length=64)


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and learning rates, the same for every method and every seed."""

    background: int = 60
    famous: int = 20
    authors: int = 40
    forget_share: float = 0.5
    pretraining: TrainSettings = TrainSettings(
        epochs=15, lr=4e-3, warmup_steps=20, micro_batch_tokens=4096
    )
    teaching: TrainSettings = TrainSettings(
        epochs=12, lr=1e-3, warmup_steps=10, micro_batch_tokens=4096
    )
    unlearning: TrainSettings = TrainSettings(epochs=10, lr=1e-3, micro_batch_tokens=4096)
    coefficients: Coefficients = Coefficients(beta=0.1, retain=5.0)  # the paper's, to forget half

    def dataset(self, seed: int, overlap: float | None = None) -> AuthorDataset:
        """The data set of these sizes; ``make_dataset`` says what the overlap is."""
        return make_dataset(
            seed, background=self.background, famous=self.famous, authors=self.authors,
            forget_share=self.forget_share, overlap=overlap,
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One model, measured: where forget quality peaked, and at the end."""

    path: list[Point]
    peak: Point
    last: Point
    answers: dict[str, str]  # to a "forgotten" and to a "kept" question, at the end
    time_s: float


class PeakCallback(Callback):
    """Takes the forget quality after every epoch, and keeps the weights where it was highest."""

    def __init__(self, forget_quality: Callable[[CausalLM], float]) -> None:
        self.forget_quality = forget_quality
        self.path: list[Point] = []
        self.weights: dict[str, Tensor] = {}

    def on_start(self, training: Training) -> None:
        self.lm = training.lm

    def on_step(self, record: StepRecord) -> None:
        if abs(record.epoch - round(record.epoch)) > 1e-9:  # within an epoch
            return
        highest = max((point.forget_quality for point in self.path), default=-1.0)
        self.path.append(Point(round(record.epoch), self.forget_quality(self.lm)))
        if self.path[-1].forget_quality > highest:
            self.peak, self.weights = self.path[-1], weights(self.lm)


class Demo:
    """Holds the small dataset and walks through the experiment once."""

    def __init__(self, folder: Path, seed: int, settings: DemoSettings) -> None:
        self.folder, self.seed, self.settings = folder, seed, settings
        self.dataset = settings.dataset(seed)
        self.tokenizer = train_tokenizer(self.dataset.texts())
        self.template = Template(self.tokenizer, LOADING.template, LOADING.max_length)
        self.suite = {
            metrics.RETAIN: self.dataset.retain,
            metrics.REAL_AUTHORS: self.dataset.famous,
            metrics.WORLD_FACTS: self.dataset.countries,
            metrics.FORGET: self.dataset.forget,
        }
        self.shown = {"forgotten": self.dataset.forget[0], "kept": self.dataset.retain[0]}
        self.retrained: metrics.Result = {}

    def run(self) -> dict[str, Outcome]:
        """Every model by name, the original and the retrained one first."""
        dataset, settings = self.dataset, self.settings
        lm = new_model(self.tokenizer, self.seed)
        common = dataset.background + dataset.common * COMMON_REPEATS
        self._finetune(lm, common, "pretraining", settings.pretraining)
        pretrained = weights(lm)
        outcomes = {}
        # the retrained model comes first: forget quality compares every other one with it
        taught = {"retrained": dataset.retain, "original": dataset.retain + dataset.forget}
        for name, records in taught.items():
            lm.model.load_state_dict(pretrained)
            self._finetune(lm, records, name, settings.teaching)
            logs = self._evaluate(lm, name)
            self.retrained = self.retrained or logs
            point = self._point(0, logs)
            outcomes[name] = Outcome([], point, point, self._answers(logs), 0.0)
        original = weights(lm)
        for method in METHODS:
            lm.model.load_state_dict(original)
            outcomes[method] = self._unlearn(lm, method)
        return outcomes

    def _finetune(
        self, lm: CausalLM, records: list[Record], name: str, settings: TrainSettings
    ) -> None:
        finetune(
            lm, train=records, output=self.folder / name, tokenizer=self.tokenizer,
            loading=LOADING, training=replace(settings, seed=self.seed),
        )  # fmt: skip

    def _unlearn(self, lm: CausalLM, method: str) -> Outcome:
        started = time.perf_counter()
        callback = PeakCallback(self._forget_quality)
        name = method.lower().replace("+", "-")
        unlearn(
            lm,
            forget=self.dataset.forget,
            retain=self.dataset.retain,
            method=MethodOptions.of(method, self.settings.coefficients.for_method(method)),
            output=self.folder / name,
            tokenizer=self.tokenizer,
            loading=LOADING,
            training=replace(self.settings.unlearning, seed=self.seed),
            report=ReportOptions(no_report=True),
            callbacks=[callback],
        )
        path = callback.path
        logs = self._evaluate(lm, name)
        path[-1] = self._point(path[-1].epoch, logs)
        peak = path[-1]
        if callback.peak.epoch != peak.epoch:
            lm.model.load_state_dict(callback.weights)
            peak = self._point(callback.peak.epoch, self._evaluate(lm, f"{name}/peak"))
            path[peak.epoch - 1] = peak
        return Outcome(path, peak, path[-1], self._answers(logs), time.perf_counter() - started)

    def _forget_quality(self, lm: CausalLM) -> float:
        suite = {metrics.FORGET: self.dataset.forget}
        logs = evaluate_suite(lm, self.template, suite, EvaluationSettings(generate=False))
        return metrics.forget_quality(logs, self.retrained)

    def _evaluate(self, lm: CausalLM, name: str) -> metrics.Result:
        settings = EvaluationSettings(generation_batch=256, max_new_tokens=24)
        logs = evaluate_suite(lm, self.template, self.suite, settings)
        metrics.save_result(logs, self.folder / name / "eval")
        return logs

    def _point(self, epoch: int, result: metrics.Result) -> Point:
        return Point(
            epoch, metrics.forget_quality(result, self.retrained), metrics.model_utility(result)
        )

    def _answers(self, result: metrics.Result) -> dict[str, str]:
        """What the model says to the first question about a forgotten and about a kept author."""
        return {
            name: result[log]["generated_text"][0][1]
            for name, log in (("forgotten", metrics.FORGET), ("kept", metrics.RETAIN))
        }

    def describe(self, outcomes: Mapping[str, Outcome], time_s: float) -> dict[str, Any]:
        """The result of ``run``, with all that can change it."""
        return {
            "seed": self.seed,
            "time_s": time_s,
            "versions": versions(),
            "settings": asdict(self.settings),
            "models": {name: asdict(outcome) for name, outcome in outcomes.items()},
        }

    def write(self, outcomes: Mapping[str, Outcome], result: Mapping[str, object]) -> None:
        """The plot, and ``result.json``."""
        plot_unlearning(
            {name: outcomes[name].path for name in METHODS},
            {name: outcomes[name].last for name in ("original", "retrained")},
            self.folder / "unlearning.png",
        )
        (self.folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
