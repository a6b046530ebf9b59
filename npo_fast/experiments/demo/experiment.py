"""The demo: teach, retrain, unlearn half, measure. Small enough to watch."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from npo_fast import metrics
from npo_fast.data import Record, Template, TokenizedExample
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.experiments.demo.dataset import AuthorDataset, make_dataset
from npo_fast.experiments.demo.tiny_model import new_model, train_tokenizer, weights
from npo_fast.methods import FINETUNE, Coefficients, build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.report import Point, plot_unlearning
from npo_fast.runs.folder import save_model
from npo_fast.trainer.loop import reference_log_probs, train
from npo_fast.trainer.settings import StepRecord, TrainSettings

METHODS = ("GA", "GA+RT", "NPO", "NPO+RT")
COMMON_REPEATS = 3  # famous authors and countries are seen more often than the background
Weights = dict[str, Tensor]
Bar = Callable[[Iterator[StepRecord], str], Iterable[StepRecord]]  # shows the steps of one part


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


@dataclass(frozen=True)
class Outcome:
    """One model, measured: where forget quality peaked, and at the end."""

    path: list[Point]
    peak: Point
    last: Point
    answers: dict[str, str]  # to a "forgotten" and to a "kept" question, at the end
    time_s: float


class Demo:
    """Holds the small world and walks through the experiment once."""

    def __init__(self, folder: Path, seed: int, settings: DemoSettings, bar: Bar) -> None:
        self.folder, self.seed, self.settings, self.bar = folder, seed, settings, bar
        self.world: AuthorDataset = make_dataset(
            seed,
            background=settings.background,
            famous=settings.famous,
            authors=settings.authors,
            forget_share=settings.forget_share,
        )
        self.tokenizer = train_tokenizer(self.world.texts())
        self.template = Template(self.tokenizer, "plain", max_length=64)
        self.suite = {
            metrics.RETAIN: self.world.retain,
            metrics.REAL_AUTHORS: self.world.famous,
            metrics.WORLD_FACTS: self.world.countries,
            metrics.FORGET: self.world.forget,
        }
        self.shown = {"forgotten": self.world.forget[0], "kept": self.world.retain[0]}
        self.retrained: metrics.Result | None = None

    def run(self) -> dict[str, Outcome]:
        """Every model by name, the original and the retrained one first."""
        world = self.world
        lm = new_model(self.tokenizer, self.seed)
        self._learn(lm, world.background + world.common * COMMON_REPEATS, "pretraining")
        pretrained = weights(lm)
        outcomes = {}
        # the retrained model comes first: forget quality compares every other one with it
        for name, records in (
            ("retrained", world.retain),
            ("original", world.retain + world.forget),
        ):
            lm.model.load_state_dict(pretrained)
            self._learn(lm, records, name)
            outcomes[name] = self._anchor(lm, name)
        original = weights(lm)
        for method in METHODS:
            lm.model.load_state_dict(original)
            outcomes[method] = self._unlearn(lm, method)
        return outcomes

    def _learn(self, lm: CausalLM, records: list[Record], what: str) -> None:
        settings = self.settings.pretraining if what == "pretraining" else self.settings.teaching
        settings = _seeded(settings, self.seed)
        sources = {"train": self._encode(records)}
        for _ in self.bar(train(lm, sources, FINETUNE, settings), what):
            pass

    def _unlearn(self, lm: CausalLM, method: str) -> Outcome:
        started = time.perf_counter()
        settings = _seeded(self.settings.unlearning, self.seed)
        terms = build_method(method, self.settings.coefficients.for_method(method))
        sources = {
            "forget": self._encode(self.world.forget),
            "retain": self._encode(self.world.retain),
        }
        references = reference_log_probs(lm, sources, terms, settings.micro_batch_tokens)
        path: list[Point] = []
        best: tuple[Point, Weights] | None = None
        folder = self.folder / _slug(method)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "steps.jsonl").open("w") as file:
            for record in self.bar(train(lm, sources, terms, settings, references), method):
                file.write(json.dumps(asdict(record)) + "\n")
                if not _ends_epoch(record):
                    continue
                point = Point(round(record.epoch), self._forget_quality(lm))
                path.append(point)
                if best is None or point.forget_quality > best[0].forget_quality:
                    best = point, weights(lm)
        assert best is not None
        last = self._measure(lm, _slug(method))
        path[-1] = self._point(path[-1].epoch, last)
        save_model(lm, self.tokenizer, folder / "model")
        peak = path[-1]
        if best[0].epoch != peak.epoch:
            final = weights(lm)
            lm.model.load_state_dict(best[1])
            peak = self._point(best[0].epoch, self._measure(lm, f"{_slug(method)}/peak"))
            path[peak.epoch - 1] = peak
            lm.model.load_state_dict(final)
        return Outcome(path, peak, path[-1], self._answers(last), time.perf_counter() - started)

    def _forget_quality(self, lm: CausalLM) -> float:
        suite = {metrics.FORGET: self.world.forget}
        log = evaluate(lm, self.template, suite, EvaluationSettings(generate=False))
        assert self.retrained is not None
        return metrics.forget_quality(log, self.retrained)

    def _measure(self, lm: CausalLM, name: str) -> metrics.Result:
        settings = EvaluationSettings(generation_batch=256, max_new_tokens=24)
        result = evaluate(lm, self.template, self.suite, settings)
        metrics.save_result(result, self.folder / name / "eval")
        return result

    def _point(self, epoch: int, result: metrics.Result) -> Point:
        assert self.retrained is not None
        return Point(
            epoch, metrics.forget_quality(result, self.retrained), metrics.model_utility(result)
        )

    def _anchor(self, lm: CausalLM, name: str) -> Outcome:
        result = self._measure(lm, name)
        save_model(lm, self.tokenizer, self.folder / name / "model")
        if name == "retrained":
            self.retrained = result
        point = self._point(0, result)
        return Outcome([], point, point, self._answers(result), 0.0)

    def _answers(self, result: metrics.Result) -> dict[str, str]:
        """What the model says to the first question about a forgotten and about a kept author."""
        return {
            name: result[log]["generated_text"][0][1]
            for name, log in (("forgotten", metrics.FORGET), ("kept", metrics.RETAIN))
        }

    def _encode(self, records: list[Record]) -> list[TokenizedExample]:
        return self.template.encode_all(records)[0]

    def write(self, outcomes: Mapping[str, Outcome], result: Mapping[str, object]) -> None:
        """The plot, and ``result.json``."""
        plot_unlearning(
            {name: outcomes[name].path for name in METHODS},
            {name: outcomes[name].last for name in ("original", "retrained")},
            self.folder / "unlearning.png",
        )
        (self.folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def _seeded(settings: TrainSettings, seed: int) -> TrainSettings:
    return replace(settings, seed=seed)


def _ends_epoch(record: StepRecord) -> bool:
    return abs(record.epoch - round(record.epoch)) < 1e-9


def _slug(method: str) -> str:
    return method.lower().replace("+", "-")
