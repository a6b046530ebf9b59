"""One seed's models: taught once, then unlearned in every way that is asked for."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from npo_fast import metrics
from npo_fast.boundary import read_json
from npo_fast.data import Record
from npo_fast.data.answers import REFUSALS
from npo_fast.errors import UserError
from npo_fast.experiments.ablations.trials import OVERLAPS, AblationSettings, SeedFile, Trial
from npo_fast.experiments.demo.dataset import AuthorDataset
from npo_fast.experiments.demo.experiment import COMMON_REPEATS, Student
from npo_fast.experiments.demo.tiny_model import weights
from npo_fast.model.save import save_file
from npo_fast.runs import Callback
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
            self.evaluations.append({"step": record.step, "epoch": record.epoch, **self.evaluate()})


class Runner:
    """Pretrains one model a seed, and teaches it the authors of a dataset for each trial."""

    def __init__(self, seed: int, settings: AblationSettings) -> None:
        self.seed, self.settings = seed, settings
        datasets = [settings.world.dataset(seed, overlap) for overlap in OVERLAPS]
        texts = [text for dataset in datasets for text in dataset.texts()]
        self.student = Student([*texts, *REFUSALS], seed)
        first = datasets[0]  # background and common facts are the same for every overlap
        self._learn(first.background + first.common * COMMON_REPEATS, settings.world.pretraining)
        self.pretrained = weights(self.student.lm)
        self.pairs: dict[float, TrainedPair] = {}

    def run(self, trial: Trial) -> dict[str, Any]:
        """The evaluations of a trial, step 0 first, and what it took."""
        pair = self._trained_pair(trial.overlap)
        self.student.lm.model.load_state_dict(pair.original)
        turns = 2 if trial.schedule == "alternating" else 1
        callback = EvaluateSteps(lambda: self._scores(pair), turns * self.settings.looks_every)
        training = replace(self.settings.unlearning, schedule=trial.schedule)
        started = time.perf_counter()
        with TemporaryDirectory() as folder:
            self.student.unlearn(
                training, forget=pair.dataset.forget, retain=pair.dataset.retain,
                output=Path(folder) / "run",
                method=trial.terms(self.settings.retain), callbacks=[callback],
            )  # fmt: skip
        return {
            "looks": callback.evaluations,
            "retrained_utility": metrics.model_utility(pair.retrained),
            "time_s": time.perf_counter() - started,
        }

    def _trained_pair(self, overlap: float) -> TrainedPair:
        if overlap not in self.pairs:
            dataset = self.settings.world.dataset(self.seed, overlap)
            teaching = self.settings.world.teaching
            self.student.lm.model.load_state_dict(self.pretrained)
            self._learn(dataset.retain, teaching)
            retrained = self._measure(dataset)
            self.student.lm.model.load_state_dict(self.pretrained)
            self._learn(dataset.retain + dataset.forget, teaching)
            self.pairs[overlap] = TrainedPair(dataset, weights(self.student.lm), retrained)
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
        kept, forget = dataset.kept(self.settings.look_records), {metrics.FORGET: dataset.forget}
        tokens = self.settings.look_tokens
        return {
            **self.student.evaluate(kept, generation_batch=256, max_new_tokens=tokens),
            **self.student.evaluate(forget, generate=False),
        }

    def _learn(self, records: list[Record], settings: TrainSettings) -> None:
        with TemporaryDirectory() as folder:
            self.student.learn(records, settings, Path(folder) / "run")


def run_seed(
    seed: int,
    trials: Iterable[Trial],
    settings: AblationSettings,
    file: Path,
    provenance: Mapping[str, Any],
    log: Callable[[str], None],
) -> None:
    """Runs the trials that ``file`` does not hold yet, and writes the file after each.

    Raises:
        UserError: the file holds results of other settings.
    """
    wanted, defaults = (json.loads(json.dumps(asdict(x))) for x in (settings, AblationSettings()))
    content: dict[str, Any] = {"seed": seed, "settings": wanted, "time_s": 0.0, "runs": []}
    if file.exists():
        content = read_json(file, SeedFile)
        if _completed(content["settings"], defaults) != wanted:
            raise UserError(f"{file} holds ablations of other settings; name another folder")
    done = {Trial(**run["trial"]) for run in content["runs"]}
    left = [trial for trial in dict.fromkeys(trials) if trial not in done]
    if not left:
        return
    content["provenance"] = dict(provenance)
    started, before = time.perf_counter(), content["time_s"]
    runner = Runner(seed, settings)
    for trial in left:
        run = {"trial": asdict(trial), **runner.run(trial), "commit": provenance.get("commit")}
        content["runs"].append(run)
        content["time_s"] = before + time.perf_counter() - started
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1) + "\n"
        save_file(file, partial(Path.write_text, data=text, encoding="utf-8"))
        log(f"seed {seed}, {trial}: {run['time_s']:.0f} s")


def _completed(stored: Any, defaults: Any) -> Any:
    """Stored settings; those that are not stored, since they came later, are the defaults."""
    if not (isinstance(stored, dict) and isinstance(defaults, dict)):
        return stored
    return stored | {
        name: _completed(stored.get(name, value), value) for name, value in defaults.items()
    }
