"""A run folder: settings and versions, step records, checkpoints, the final model.

run.json            what was asked for, with which versions, on which data, and how it ended
steps.jsonl         one step record a line, written as it happens
evaluations.jsonl   one evaluation a line, where any were asked for
checkpoints/step-N  model and tokenizer, complete or absent
checkpoints/best    the same of the best evaluation
model               the final model and tokenizer

With LoRA each of these models is the adapter alone.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch

from npo_fast import __version__
from npo_fast.data import Sequence
from npo_fast.errors import UserError
from npo_fast.model.adapters import read_weights, write_weights
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.progress import no_progress_bars
from npo_fast.model.save import save_folder
from npo_fast.trainer.settings import StepRecord

CONTENT = (
    "run.json", "steps.jsonl", "evaluations.jsonl", "checkpoints", "model", "eval", "eval-steps",
)  # fmt: skip


class Run:
    """Creates the folder, refuses one that holds something else, and keeps it consistent."""

    def __init__(self, folder: Path, overwrite: bool, facts: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: the folder holds another run and ``overwrite`` is false, or holds files
                that are not a run's.
        """
        check_output(folder, overwrite)
        for name in CONTENT:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.facts = {"status": "running", "started": _now(), "versions": versions(), **facts}
        self._write_facts()
        self._steps: TextIO = (folder / "steps.jsonl").open("w", encoding="utf-8")

    def log(self, record: StepRecord) -> None:
        self._steps.write(json.dumps(asdict(record)) + "\n")
        self._steps.flush()

    def log_evaluation(self, look: Mapping[str, Any]) -> None:
        with (self.folder / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(look) + "\n")

    def checkpoint(self, lm: CausalLM, tokenizer: Any, step: int, keep_older: bool = False) -> Path:
        """Model and tokenizer after ``step``; once it is complete, older ones go."""
        folder = self.folder / "checkpoints" / f"step-{step:06d}"
        save_model(lm, tokenizer, folder)
        for old in sorted(folder.parent.glob("step-*")):
            if old != folder and not keep_older:
                shutil.rmtree(old)
        return folder

    def keep_best(self, lm: CausalLM, tokenizer: Any) -> None:
        save_model(lm, tokenizer, self.folder / "checkpoints" / "best")

    def restore_best(self, lm: CausalLM) -> None:
        """The weights of ``keep_best``, in place."""
        with no_progress_bars():
            read_weights(lm, self.folder / "checkpoints" / "best")

    def save_model(self, lm: CausalLM, tokenizer: Any) -> Path:
        folder = self.folder / "model"
        save_model(lm, tokenizer, folder)
        return folder

    def finish(self, status: str = "finished", **facts: Any) -> None:
        self._steps.close()
        if torch.cuda.is_available():  # of the process so far: weights, training, evaluations
            facts["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self.facts |= {"status": status, "ended": _now(), **facts}
        self._write_facts()

    def _write_facts(self) -> None:
        partial = self.folder / "run.json.partial"
        partial.write_text(json.dumps(self.facts, indent=2, default=str), encoding="utf-8")
        partial.replace(self.folder / "run.json")


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds another run, or anything that is not a run."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the output {folder} is a file; name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "run.json").exists():
        raise UserError(f"the output {folder} holds files that are not a run; name another folder")
    if not overwrite:
        raise UserError(
            f"the output {folder} holds another run; name another folder or add --overwrite"
        )


def save_model(lm: CausalLM, tokenizer: Any, folder: Path) -> None:
    def write(where: Path) -> None:
        with no_progress_bars():
            write_weights(lm, where)
        tokenizer.save_pretrained(where)

    save_folder(folder, write)


def data_fingerprint(sequences: list[Sequence]) -> str:
    """SHA-256 over the token ids and where each answer begins."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(f"{sequence.prompt_length}:{sequence.input_ids}".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of everything that can change a number."""
    found = {"npo_fast": __version__, "python": platform.python_version()}
    for package in (
        "torch", "transformers", "triton", "safetensors", "numpy", "scipy", "torchao", "peft",
        "bitsandbytes",
    ):  # fmt: skip
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
