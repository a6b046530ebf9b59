"""One seed's models: taught once, then unlearned in every way that is asked for."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from npo_fast import metrics
from npo_fast.data import Record, Template
from npo_fast.data.answers import REFUSALS
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.experiments.ablations.trials import OVERLAPS, AblationSettings, Trial
from npo_fast.experiments.demo.dataset import AuthorDataset
from npo_fast.experiments.demo.experiment import COMMON_REPEATS, LOADING
from npo_fast.experiments.demo.tiny_model import new_model, train_tokenizer, weights
from npo_fast.runs import Callback, ReportOptions, finetune, unlearn
from npo_fast.runs.callbacks import Training
from npo_fast.trainer.settings import StepRecord, TrainSettings

Scores = dict[str, float]


@dataclass(frozen=True)
class TrainedPair:
    """A dataset, the model that was taught all of it, and the log of one that never met a part."""

    dataset: AuthorDataset
    original: dict[str, Tensor]
    retrained: metrics.Result


class EvaluateSteps(Callback):
    """Evaluates before the first step, every ``every`` steps, and after the last."""

    def __init__(self, evaluate: Callable[[], Scores], every: int) -> None:
        self.evaluate, self.every = evaluate, every
        self.evaluations: list[Scores] = []

    def on_start(self, training: Training) -> None:
        self.evaluations.append({"step": 0, "epoch": 0.0, **self.evaluate()})

    def on_step(self, record: StepRecord) -> None:
        if record.step % self.every == 0 or record.step == record.steps:
            scores = {"step": record.step, "epoch": record.epoch, **self.evaluate()}
            self.evaluations.append(scores)


class Runner:
    """Pretrains one model a seed, and teaches it the authors of a dataset for each trial."""

    def __init__(self, seed: int, settings: AblationSettings) -> None:
        self.seed, self.settings = seed, settings
        datasets = [settings.world.dataset(seed, overlap) for overlap in OVERLAPS]
        texts = [text for dataset in datasets for text in dataset.texts()]
        self.tokenizer = train_tokenizer([*texts, *REFUSALS])
        self.template = Template(self.tokenizer, LOADING.template, LOADING.max_length)
        self.lm = new_model(self.tokenizer, seed)
        first = datasets[0]  # background and common facts are the same for every overlap
        self._learn(first.background + first.common * COMMON_REPEATS, settings.world.pretraining)
        self.pretrained = weights(self.lm)
        self.pairs: dict[float, TrainedPair] = {}

    def run(self, trial: Trial) -> dict[str, Any]:
        """The evaluations of a trial, step 0 first, and what it took."""
        pair = self._trained_pair(trial.overlap)
        self.lm.model.load_state_dict(pair.original)
        turns = 2 if trial.schedule == "alternating" else 1
        callback = EvaluateSteps(lambda: self._scores(pair), turns * self.settings.looks_every)
        started = time.perf_counter()
        with TemporaryDirectory() as folder:
            unlearn(
                self.lm,
                forget=pair.dataset.forget,
                retain=pair.dataset.retain,
                method=trial.terms(self.settings.retain),
                output=Path(folder) / "run",
                tokenizer=self.tokenizer,
                loading=LOADING,
                training=replace(self.settings.unlearning, schedule=trial.schedule, seed=self.seed),
                report=ReportOptions(no_report=True),
                callbacks=[callback],
            )
        return {
            "looks": callback.evaluations,
            "retrained_utility": metrics.model_utility(pair.retrained),
            "time_s": time.perf_counter() - started,
        }

    def _trained_pair(self, overlap: float) -> TrainedPair:
        if overlap not in self.pairs:
            dataset = self.settings.world.dataset(self.seed, overlap)
            teaching = self.settings.world.teaching
            self.lm.model.load_state_dict(self.pretrained)
            self._learn(dataset.retain, teaching)
            retrained = self._measure(dataset)
            self.lm.model.load_state_dict(self.pretrained)
            self._learn(dataset.retain + dataset.forget, teaching)
            self.pairs[overlap] = TrainedPair(dataset, weights(self.lm), retrained)
        return self.pairs[overlap]

    def _scores(self, pair: TrainedPair) -> Scores:
        result = self._measure(pair.dataset)
        forget, retain = result[metrics.FORGET], result[metrics.RETAIN]
        return {
            "forget_quality": metrics.forget_quality(result, pair.retrained),
            "model_utility": metrics.model_utility(result),
            "forget_probability": float(metrics.probability(forget).mean()),
            "retain_probability": float(metrics.probability(retain).mean()),
        }

    def _measure(self, dataset: AuthorDataset) -> metrics.Result:
        """All forget facts by their losses, and the first records of what is to be kept."""
        first = slice(self.settings.look_records)
        kept = {
            metrics.RETAIN: dataset.retain[first],
            metrics.REAL_AUTHORS: dataset.famous[first],
            metrics.WORLD_FACTS: dataset.countries[first],
        }
        how = EvaluationSettings(generation_batch=256, max_new_tokens=self.settings.look_tokens)
        losses = replace(how, generate=False)
        return {
            **evaluate(self.lm, self.template, kept, how),
            **evaluate(self.lm, self.template, {metrics.FORGET: dataset.forget}, losses),
        }

    def _learn(self, records: list[Record], settings: TrainSettings) -> None:
        with TemporaryDirectory() as folder:
            finetune(
                self.lm, train=records, output=Path(folder) / "run", tokenizer=self.tokenizer,
                loading=LOADING, training=replace(settings, seed=self.seed),
            )  # fmt: skip
