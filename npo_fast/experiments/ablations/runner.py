"""One seed's models: taught once, then unlearned in every way that is asked for."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from npo_fast import metrics
from npo_fast.data import Record, Template, TokenizedExample
from npo_fast.data.answers import REFUSALS, refused
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.experiments.ablations.trials import OVERLAPS, AblationSettings, Trial
from npo_fast.experiments.demo.dataset import AuthorDataset, make_dataset
from npo_fast.experiments.demo.experiment import COMMON_REPEATS
from npo_fast.experiments.demo.tiny_model import new_model, train_tokenizer, weights
from npo_fast.methods import FINETUNE
from npo_fast.trainer.loop import reference_log_probs, train
from npo_fast.trainer.settings import TrainSettings

Look = dict[str, float]


@dataclass(frozen=True)
class TrainedPair:
    """A world, the model that was taught all of it, and the log of one that never met a part."""

    world: AuthorDataset
    original: dict[str, Tensor]
    retrained: metrics.Result
    retrained_utility: float


class Runner:
    """Pretrains one model a seed; it is taught the authors of a world when a trial asks for it."""

    def __init__(self, seed: int, settings: AblationSettings) -> None:
        self.seed, self.settings = seed, settings
        texts = [text for overlap in OVERLAPS for text in self._world(overlap).texts()]
        self.tokenizer = train_tokenizer([*texts, *REFUSALS])
        self.template = Template(self.tokenizer, "plain", max_length=64)
        self.lm = new_model(self.tokenizer, seed)
        world = self._world(OVERLAPS[0])  # what comes first does not depend on the overlap
        self._learn(world.background + world.common * COMMON_REPEATS, settings.world.pretraining)
        self.pretrained = weights(self.lm)
        self.pairs: dict[float, TrainedPair] = {}

    def run(self, trial: Trial) -> dict[str, Any]:
        """The looks of a trial, step 0 first, and what it took."""
        pair = self._trained_pair(trial.overlap)
        self.lm.model.load_state_dict(pair.original)
        started = time.perf_counter()
        looks = list(self._unlearn(trial, pair))
        return {
            "looks": looks,
            "retrained_utility": pair.retrained_utility,
            "time_s": time.perf_counter() - started,
        }

    def _unlearn(self, trial: Trial, pair: TrainedPair) -> Iterator[Look]:
        settings = replace(self.settings.unlearning, schedule=trial.schedule, seed=self.seed)
        terms = trial.terms(self.settings.retain)
        world = pair.world
        sources = {
            "forget": self._encode(world.forget),
            "retain": self._encode(world.retain),
            "idk": self._encode(refused(world.forget, REFUSALS, self.seed)),
        }
        references = reference_log_probs(self.lm, sources, terms, settings.micro_batch_tokens)
        turns = 2 if trial.schedule == "alternating" else 1
        yield {"step": 0, "epoch": 0.0, **self._look(pair)}
        for record in train(self.lm, sources, terms, settings, references):
            if (
                record.step % (turns * self.settings.looks_every) == 0
                or record.step == record.steps
            ):
                yield {"step": record.step, "epoch": record.epoch, **self._look(pair)}

    def _trained_pair(self, overlap: float) -> TrainedPair:
        if overlap not in self.pairs:
            world = self._world(overlap)
            self.lm.model.load_state_dict(self.pretrained)
            self._learn(world.retain, self.settings.world.teaching)
            retrained = self._measure(world)
            self.lm.model.load_state_dict(self.pretrained)
            self._learn(world.retain + world.forget, self.settings.world.teaching)
            utility = metrics.model_utility(retrained)
            self.pairs[overlap] = TrainedPair(world, weights(self.lm), retrained, utility)
        return self.pairs[overlap]

    def _look(self, pair: TrainedPair) -> Look:
        result = self._measure(pair.world)
        forget, retain = result[metrics.FORGET], result[metrics.RETAIN]
        return {
            "forget_quality": metrics.forget_quality(result, pair.retrained),
            "model_utility": metrics.model_utility(result),
            "forget_probability": float(metrics.probability(forget).mean()),
            "retain_probability": float(metrics.probability(retain).mean()),
        }

    def _measure(self, world: AuthorDataset) -> metrics.Result:
        """All forget facts by their losses, and the first records of what is to be kept."""
        first = slice(self.settings.look_records)
        kept = {
            metrics.RETAIN: world.retain[first],
            metrics.REAL_AUTHORS: world.famous[first],
            metrics.WORLD_FACTS: world.countries[first],
        }
        how = EvaluationSettings(generation_batch=256, max_new_tokens=self.settings.look_tokens)
        losses = replace(how, generate=False)
        return {
            **evaluate(self.lm, self.template, kept, how),
            **evaluate(self.lm, self.template, {metrics.FORGET: world.forget}, losses),
        }

    def _world(self, overlap: float) -> AuthorDataset:
        sizes = self.settings.world
        return make_dataset(
            self.seed,
            background=sizes.background,
            famous=sizes.famous,
            authors=sizes.authors,
            forget_share=sizes.forget_share,
            overlap=overlap,
        )

    def _learn(self, records: list[Record], settings: TrainSettings) -> None:
        sources = {"train": self._encode(records)}
        for _ in train(self.lm, sources, FINETUNE, replace(settings, seed=self.seed)):
            pass

    def _encode(self, records: list[Record]) -> list[TokenizedExample]:
        return self.template.encode_all(records)[0]
