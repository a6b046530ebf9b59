"""The demo: teach, retrain, unlearn half, measure over time. Small enough to watch."""

import json
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npo_fast import metrics
from npo_fast.data import Record, Template
from npo_fast.errors import UserError
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.experiments.demo.dataset import AuthorDataset, make_dataset
from npo_fast.experiments.demo.tiny_model import new_model, train_tokenizer, weights
from npo_fast.metrics import examples_in
from npo_fast.metrics.evidence import MEANINGFUL, Evidence
from npo_fast.metrics.measures import measures
from npo_fast.metrics.verdict import Verdict, judge
from npo_fast.quiet import begin_helper
from npo_fast.reports.figures import Point, plot_unlearning
from npo_fast.runs import (
    Callback,
    MethodOptions,
    ModelOptions,
    ReportOptions,
    finetune,
    report,
    unlearn,
)
from npo_fast.runs.options import AUTO
from npo_fast.runs.progress import progress, silence
from npo_fast.tables import number
from npo_fast.trainer.order import step_count
from npo_fast.trainer.settings import StepRecord, TrainSettings
from npo_fast.versions import versions

METHODS = ("GA", "GA+RT", "NPO+RT", "SimNPO+RT")
RESULT, PLOT, PAGE = "result.json", "unlearning.png", "report.html"
MADE = (  # beside a folder a method
    "data", "pretraining", "retrained", "original", PLOT, PAGE, "report.md",
)  # fmt: skip
COMMON_REPEATS = 3  # famous authors and countries are seen more often than the background
LOADING = ModelOptions(template="plain", max_length=64)
KEPT = 0.85  # share of the utility that counts as kept (the paper: 0.55 of 0.62)


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and learning rates, the same for every method and every seed."""

    background: int = 60
    famous: int = 20
    authors: int = 40
    forget_share: float = 0.5
    pretraining: TrainSettings = TrainSettings(
        epochs=9, lr=4e-3, warmup_steps=20, micro_batch_tokens=4096
    )
    teaching: TrainSettings = TrainSettings(
        epochs=12, lr=1e-3, warmup_steps=10, micro_batch_tokens=4096
    )
    unlearning: TrainSettings = TrainSettings(epochs=20, lr=1e-3, micro_batch_tokens=4096)
    looks: tuple[int, ...] = (1, 2, 4, 6, 10, 15)  # epochs, beside the last

    def dataset(self, seed: int, overlap: float | None = None) -> AuthorDataset:
        """The data set of these sizes; ``make_dataset`` says what the overlap is."""
        return make_dataset(
            seed, background=self.background, famous=self.famous, authors=self.authors,
            forget_share=self.forget_share, overlap=overlap,
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One model, measured: over the epochs of unlearning, and at the end."""

    path: list[Point]  # the last of it is the end
    model_utility: float
    answers: dict[str, str]  # to a "forgotten" and to a "kept" question
    verdict: Verdict
    beta: float | None = None
    time_s: float = 0.0

    @property
    def last(self) -> Point:
        """At the end."""
        return self.path[-1]

    @property
    def best(self) -> Point:
        """Where forget quality was highest."""
        return max(self.path, key=lambda point: point.forget_quality)


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

    def teach(
        self, dataset: AuthorDataset, settings: DemoSettings, folder: Path
    ) -> dict[str, dict[str, Tensor]]:
        """Weights by name: "pretrained", "retrained" without the forget set, "original"."""
        common = dataset.background + dataset.common * COMMON_REPEATS
        self.learn(common, settings.pretraining, folder / "pretraining")
        made = {"pretrained": weights(self.lm)}
        taught = {"retrained": dataset.retain, "original": dataset.retain + dataset.forget}
        for name, records in taught.items():
            self.lm.model.load_state_dict(made["pretrained"])
            self.learn(records, settings.teaching, folder / name)
            made[name] = weights(self.lm)
        return made

    def unlearn(self, settings: TrainSettings, **more: Any) -> Mapping[str, Any]:
        """What ``run.json`` says; ``more`` is the data, the method, the output and so on."""
        run = unlearn(
            self.lm, tokenizer=self.tokenizer, loading=LOADING,
            training=replace(settings, seed=self.seed), report=ReportOptions(no_report=True),
            **more,
        )  # fmt: skip
        return run.metadata

    def evaluate(self, suite: Mapping[str, list[Record]], **settings: Any) -> metrics.Result:
        """Evaluation logs of the sets; ``settings`` are those of ``EvaluationSettings``."""
        template = Template(self.tokenizer, LOADING.template, LOADING.max_length)
        return evaluate(self.lm, template, suite, EvaluationSettings(**settings))


class Looks(Callback):
    """Measures forget quality and what is kept after some epochs."""

    def __init__(self, demo: "Demo") -> None:
        self.demo = demo
        self.path: list[Point] = []

    def on_step(self, record: StepRecord) -> None:
        epoch = round(record.epoch)
        ended = abs(record.epoch - epoch) < 1e-9 and record.step < record.steps
        if ended and epoch in self.demo.settings.looks:
            self.path.append(self.demo.look(epoch))


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
        student = self.student
        self.dataset.save(self.folder / "data")
        taught = student.teach(self.dataset, self.settings, self.folder)
        outcomes = {}
        # the retrained model comes first: forget quality compares every other one with it
        for name in ("retrained", "original"):
            student.lm.model.load_state_dict(taught[name])
            logs = self._evaluate(name)
            if name == "original":
                self.original = logs
            self.retrained = self.retrained or logs
            outcomes[name] = self._outcome(logs, [self._point(0, logs)])
        return outcomes | self._side_by_side()

    def look(self, epoch: int) -> Point:
        """The model as it is, by the losses of its forget and retain answers."""
        retain = [replace(record, perturbed_answers=()) for record in self.dataset.retain]
        sets = {metrics.FORGET: self.dataset.forget, metrics.RETAIN: retain}
        return self._point(epoch, self.student.evaluate(sets, generate=False))

    def _side_by_side(self) -> dict[str, Outcome]:
        """Every method on the model as it is, in as many processes as there are cores for."""
        threads = torch.get_num_threads()
        pool = ProcessPoolExecutor(
            max(1, min(len(METHODS), (os.cpu_count() or 1) // threads)),
            multiprocessing.get_context("spawn"), begin_helper,
        )  # fmt: skip
        try:
            # bytes, since tensors would go as shared memory, and all methods train the same ones
            copy = pickle.dumps(self)
            jobs = {method: pool.submit(_unlearned, copy, method, threads) for method in METHODS}
            self._watch(list(jobs.values()))
            return {method: job.result() for method, job in jobs.items()}
        finally:
            pool.shutdown(cancel_futures=True)

    def _watch(self, jobs: list[Future[Outcome]]) -> None:
        """Draws a bar over the steps of all methods; raises the error of one that fails."""
        steps = step_count(len(self.dataset.forget), self.settings.unlearning)
        logs = [self.folder / folder_of(method) / "steps.jsonl" for method in METHODS]
        left: set[Future[Outcome]] = set(jobs)
        with progress("unlearning by") as update:
            while left and not any(job.done() and job.exception() for job in jobs):
                _, left = wait(left, timeout=0.5, return_when=FIRST_EXCEPTION)
                done = sum(log.read_bytes().count(b"\n") for log in logs if log.exists())
                update(f"{len(METHODS)} methods", done, steps * len(METHODS))
        for job in jobs:
            if job.done():
                job.result()  # raises the error of the one that failed

    def _unlearn(self, method: str) -> Outcome:
        started = time.perf_counter()
        looks, name = Looks(self), folder_of(method)
        auto: dict[str, Any] = {"beta": AUTO} if method.startswith("NPO") else {}
        known = self.student.unlearn(
            self.settings.unlearning, data=self.folder / "data", forget="forget", retain="retain",
            holdout="holdout", method=MethodOptions(method, **auto), output=self.folder / name,
            callbacks=[looks],
        )  # fmt: skip
        logs = self._evaluate(name)
        path = [*looks.path, self._point(self.settings.unlearning.epochs, logs)]
        return self._outcome(logs, path, known.get("beta"), time.perf_counter() - started)

    def _evaluate(self, name: str) -> metrics.Result:
        logs = self.student.evaluate(self.suite, generation_batch=256, max_new_tokens=16)
        metrics.save_result(logs, self.folder / name / "eval")
        return logs

    def _point(self, epoch: int, result: metrics.Result) -> Point:
        scores = measures(result, self.retrained or result)
        return Point(epoch, scores["forget_quality"], scores["retain"]["probability"])

    def _outcome(
        self, logs: metrics.Result, path: list[Point], beta: float | None = None, time_s: float = 0
    ) -> Outcome:
        utility = metrics.model_utility(logs)
        return Outcome(path, utility, self._answers(logs), self._verdict(logs), beta, time_s)

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
            "conclusion": conclusion(outcomes),
            "versions": versions(),
            "settings": asdict(self.settings),
            "models": {name: asdict(outcome) for name, outcome in outcomes.items()},
        }

    def write(self, outcomes: Mapping[str, Outcome], result: Mapping[str, object]) -> None:
        """The plot, the page about all runs, and ``result.json``."""
        plot_unlearning(
            {name: outcomes[name].path for name in METHODS},
            outcomes["retrained"].last,
            self.folder / PLOT,
        )
        report(
            [self.folder / folder_of(method) for method in METHODS],
            original=self.original, retrained=self.retrained, output=self.folder / PAGE,
        )  # fmt: skip
        (self.folder / RESULT).write_text(json.dumps(result, indent=1), encoding="utf-8")


def _unlearned(demo: bytes, method: str, threads: int) -> Outcome:
    """In a process of its own; one bar is drawn for all of them."""
    torch.set_num_threads(threads)
    silence()
    return pickle.loads(demo)._unlearn(method)


def make_room(folder: Path) -> None:
    """Deletes the demo that is in the folder, and marks the folder as that of a new one.

    Raises:
        UserError: there is something that no demo made. Nothing is deleted then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark, entries = folder / RESULT, sorted(folder.iterdir())
    made = {*MADE, RESULT, *map(folder_of, METHODS)}
    odd = [entry.name for entry in entries if entry.name not in made]
    if entries and not _is_result(mark):
        odd.insert(0, RESULT)
    if odd:
        raise UserError(
            f"{folder} holds {odd[0]}, which no demo made: move it, or name another --output"
        )
    mark.write_text("{}", encoding="utf-8")  # of one that breaks off, too
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != mark:
            entry.unlink()


def _is_result(file: Path) -> bool:
    """Whether it is the result of a demo, or of one that broke off."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return content == {} or (isinstance(content, dict) and {"settings", "models"} <= content.keys())


def folder_of(method: str) -> str:
    """The folder of a method's run in that of the demo: "npo-rt"."""
    return method.lower().replace("+", "-")


def conclusion(outcomes: Mapping[str, Outcome]) -> str:
    """One sentence from the numbers: which methods passed the test of forgetting, and stayed."""
    original = outcomes["original"].model_utility or 1.0
    stayed, left = [], []
    for name in METHODS:
        outcome = outcomes[name]
        share, last, best = outcome.model_utility / original, outcome.last, outcome.best
        kept = f"{share:.0%} of the utility"
        ended = f"(p {number(last.forget_quality)}, {kept})"
        if last.forget_quality >= MEANINGFUL and share >= KEPT:
            beta = "" if outcome.beta is None else f", beta {number(outcome.beta)} from the data"
            stayed.append(f"{name} (p {number(last.forget_quality)}, {kept}{beta})")
        elif best.forget_quality >= MEANINGFUL and last.forget_quality < MEANINGFUL:
            left.append(
                f"{name} was there at epoch {best.epoch} (p {number(best.forget_quality)}) and "
                f"left {ended}"
            )
        elif last.forget_quality >= MEANINGFUL:
            left.append(f"{name} passed at the cost of the rest {ended}")
        else:
            left.append(f"{name} did not {ended}")
    text = f"{_joined(stayed) or 'no method'} forgot like a model that never knew, and stayed there"
    return f"{text}; {'; '.join(left)}." if left else f"{text}."


def _joined(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
