"""The demo's world of a seed, taught once and kept: for keep_utility.py and robustness.py."""

import json
import math
import tempfile
from pathlib import Path

import torch

from npo_fast import metrics
from npo_fast.data import Template
from npo_fast.experiments.demo.experiment import LOADING, DemoSettings, Student
from npo_fast.experiments.demo.tiny_model import weights
from npo_fast.metrics.measures import measures
from npo_fast.model.reference_log_probs import reference_log_probs_of

SETTINGS = DemoSettings()


class World:
    """The model that knows all authors, and the log of one that never met those to forget."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.dataset = SETTINGS.dataset(seed)
        self.student = Student(self.dataset.texts(), seed)
        self.folder = folder / str(seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "original.pt").exists():
            self._teach()
        self._load("retrained")
        self.retrained = self._forget_log()
        self._load("original")
        self.original = weights(self.student.lm)
        template = Template(self.student.tokenizer, LOADING.template, LOADING.max_length)
        self.retain, _ = template.encode_all(self.dataset.retain)
        self.before = self._retain_log_prob()

    def _teach(self) -> None:
        with tempfile.TemporaryDirectory() as runs:
            taught = self.student.teach(self.dataset, SETTINGS, Path(runs))
        for name in ("retrained", "original"):
            torch.save(taught[name], self.folder / f"{name}.pt")

    def _load(self, name: str) -> None:
        self.student.lm.model.load_state_dict(torch.load(self.folder / f"{name}.pt"))

    def _forget_log(self) -> metrics.Result:
        return self.student.evaluate({metrics.FORGET: self.dataset.forget}, generate=False)

    def _retain_log_prob(self) -> float:
        """Of a token of the retain answers, in the mean."""
        (log_probs,) = reference_log_probs_of(self.student.lm, {"": self.retain}, 4096).values()
        return float(log_probs.sequences.sum()) / sum(e.answer_length for e in self.retain)

    def unlearn(self, training, **more) -> dict:
        """Unlearns the original model in the student; the last step's record."""
        self.student.lm.model.load_state_dict(self.original)
        dataset = self.dataset
        with tempfile.TemporaryDirectory() as runs:
            metadata = self.student.unlearn(
                training, forget=dataset.forget, retain=dataset.retain, output=Path(runs) / "run",
                **more,
            )  # fmt: skip
        return metadata["final"]

    def scores(self) -> dict[str, float]:
        """Of the student as it is: forgetting, and the share of retain probability that is left."""
        log = self._forget_log()
        return {
            "forget_quality": metrics.forget_quality(log, self.retrained),
            "forget_probability": measures(log)["forget"]["probability"],
            "kept": math.exp(self._retain_log_prob() - self.before),
        }


class Rows:
    """A file of results, a JSON object a line, so that a benchmark goes on where it ended."""

    def __init__(self, file: Path) -> None:
        self.file = file
        text = file.read_text() if file.exists() else ""
        self.rows = [json.loads(line) for line in text.splitlines()]

    def has(self, **key) -> bool:
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, **row) -> None:
        self.rows.append(row)
        with self.file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
