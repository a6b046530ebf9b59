"""The demo: teach, retrain, unlearn half, measure. Small enough to watch."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from npo_fast import metrics
from npo_fast.data import Record, Template
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.experiments.demo.dataset import AuthorDataset, make_dataset
from npo_fast.experiments.demo.tiny_model import new_model, train_tokenizer, weights
from npo_fast.methods import Coefficients
from npo_fast.metrics import examples_in
from npo_fast.metrics.measures import measures
from npo_fast.metrics.verdict import Evidence, Verdict, judge
from npo_fast.reports.figures import Point, plot_unlearning
from npo_fast.runs import Callback, MethodOptions, ModelOptions, ReportOptions, finetune, unlearn
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
    verdict: Verdict  # at the end
    time_s: float


class Student:
    """The small model with its tokenizer, which the library's front door teaches and unlearns."""

    def __init__(self, texts: Iterable[str], seed: int) -> None:
        self.seed = seed
        self.tokenizer = train_tokenizer(texts)
        self.lm = new_model(self.tokenizer, seed)

    def learn(self, records: list[Record], settings: TrainSettings, output: Path) -> None:
        """Trains on the records."""
        finetune(
            self.lm, train=records, output=output, tokenizer=self.tokenizer, loading=LOADING,
            training=replace(settings, seed=self.seed),
        )  # fmt: skip

    def unlearn(self, dataset: AuthorDataset, settings: TrainSettings, **more: Any) -> None:
        """Forgets the forget set; ``more`` is the method, the output and the callbacks."""
        unlearn(
            self.lm, forget=dataset.forget, retain=dataset.retain, tokenizer=self.tokenizer,
            loading=LOADING, training=replace(settings, seed=self.seed),
            report=ReportOptions(no_report=True), **more,
        )  # fmt: skip

    def evaluate(self, suite: Mapping[str, list[Record]], **settings: Any) -> metrics.Result:
        """Evaluation logs of the sets; ``settings`` are those of ``EvaluationSettings``."""
        template = Template(self.tokenizer, LOADING.template, LOADING.max_length)
        return evaluate(self.lm, template, suite, EvaluationSettings(**settings))


class PeakCallback(Callback):
    """Takes the forget quality after every epoch, and keeps the weights where it was highest."""

    def __init__(self, student: Student, forget_quality: Callable[[], float]) -> None:
        self.student, self.forget_quality = student, forget_quality
        self.path: list[Point] = []
        self.weights: dict[str, Tensor] = {}

    def on_step(self, record: StepRecord) -> None:
        if abs(record.epoch - round(record.epoch)) > 1e-9:  # within an epoch
            return
        highest = max((point.forget_quality for point in self.path), default=-1.0)
        self.path.append(Point(round(record.epoch), self.forget_quality()))
        if self.path[-1].forget_quality > highest:
            self.peak, self.weights = self.path[-1], weights(self.student.lm)


class Demo:
    """Holds the small dataset and walks through the experiment once."""

    def __init__(self, folder: Path, seed: int, settings: DemoSettings) -> None:
        self.folder, self.seed, self.settings = folder, seed, settings
        self.dataset = settings.dataset(seed)
        self.student = Student(self.dataset.texts(), seed)
        self.suite = self.dataset.kept() | {metrics.FORGET: self.dataset.forget}
        self.shown = {"forgotten": self.dataset.forget[0], "kept": self.dataset.retain[0]}
        self.original: metrics.Result = {}
        self.retrained: metrics.Result = {}

    def run(self) -> dict[str, Outcome]:
        """Every model by name, the original and the retrained one first."""
        dataset, settings, student = self.dataset, self.settings, self.student
        common = dataset.background + dataset.common * COMMON_REPEATS
        student.learn(common, settings.pretraining, self.folder / "pretraining")
        pretrained = weights(student.lm)
        outcomes = {}
        # the retrained model comes first: forget quality compares every other one with it
        taught = {"retrained": dataset.retain, "original": dataset.retain + dataset.forget}
        for name, records in taught.items():
            student.lm.model.load_state_dict(pretrained)
            student.learn(records, settings.teaching, self.folder / name)
            logs = self._evaluate(name)
            if name == "original":
                self.original = logs
            self.retrained = self.retrained or logs
            point = self._point(0, logs)
            outcomes[name] = Outcome(
                [], point, point, self._answers(logs), self._verdict(logs), 0.0
            )
        original = weights(student.lm)
        for method in METHODS:
            student.lm.model.load_state_dict(original)
            outcomes[method] = self._unlearn(method)
        return outcomes

    def _unlearn(self, method: str) -> Outcome:
        started = time.perf_counter()
        callback = PeakCallback(self.student, self._forget_quality)
        name = method.lower().replace("+", "-")
        self.student.unlearn(
            self.dataset, self.settings.unlearning, output=self.folder / name,
            method=MethodOptions.of(method, self.settings.coefficients.for_method(method)),
            callbacks=[callback],
        )  # fmt: skip
        path = callback.path
        logs = self._evaluate(name)
        path[-1] = self._point(path[-1].epoch, logs)
        peak = path[-1]
        if callback.peak.epoch != peak.epoch:
            self.student.lm.model.load_state_dict(callback.weights)
            peak = self._point(callback.peak.epoch, self._evaluate(f"{name}/peak"))
            path[peak.epoch - 1] = peak
        time_s = time.perf_counter() - started
        return Outcome(path, peak, path[-1], self._answers(logs), self._verdict(logs), time_s)

    def _forget_quality(self) -> float:
        logs = self.student.evaluate({metrics.FORGET: self.dataset.forget}, generate=False)
        return metrics.forget_quality(logs, self.retrained)

    def _evaluate(self, name: str) -> metrics.Result:
        logs = self.student.evaluate(self.suite, generation_batch=256, max_new_tokens=24)
        metrics.save_result(logs, self.folder / name / "eval")
        return logs

    def _point(self, epoch: int, result: metrics.Result) -> Point:
        quality = metrics.forget_quality(result, self.retrained)
        return Point(epoch, quality, metrics.model_utility(result))

    def _verdict(self, result: metrics.Result) -> Verdict:
        """What came out, beside the original model and the retrained one."""
        retrained, records = measures(self.retrained), examples_in(result[metrics.FORGET])
        scores = measures(result, self.retrained)
        return judge(Evidence(scores, measures(self.original), retrained, records=records))

    def _answers(self, result: metrics.Result) -> dict[str, str]:
        """What the model says to the first question about a forgotten and about a kept author."""
        logs = {"forgotten": result[metrics.FORGET], "kept": result[metrics.RETAIN]}
        return {name: log["generated_text"][0][1] for name, log in logs.items()}

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
