"""The folder of a run: settings and versions, step records, checkpoints, the final model.

run.json            what was asked for, with which versions, on which data, and how it ended
steps.jsonl         one step record a line, written as it happens
evaluations.jsonl   one evaluation a line, where any were asked for
references.pt       log-probs of the model as it was, where the method compares with them
checkpoints/step-N  model, tokenizer and the state to go on from, complete or absent
checkpoints/best    model and tokenizer of the best evaluation, and that evaluation
model               the final model and tokenizer

With LoRA each of these models is the adapter alone.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import torch

from npo_fast import run_files
from npo_fast.boundary import read_json
from npo_fast.distributed import all_reduce_max, is_main_process
from npo_fast.errors import UserError
from npo_fast.locks import lock
from npo_fast.model.adapters import no_progress_bars, read_weights, write_weights
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.save import recover, save_folder, save_tokenizer, sync
from npo_fast.model.sharding import gather_state_dict
from npo_fast.run_files import EVALUATIONS, RUN, STEPS, EvaluationLine, StepLine, read_lines
from npo_fast.trainer.settings import StepRecord
from npo_fast.trainer.state import TrainState, save_tensors
from npo_fast.versions import versions

UNFINISHED = ("running", "interrupted")  # the first is left behind by a process that was killed
REFERENCES, EVALUATION = "references.pt", "evaluation.json"
CONTENT = (
    STEPS, EVALUATIONS, REFERENCES, f"{REFERENCES}.partial", "checkpoints", "model", "eval",
    "eval-steps",
)  # fmt: skip


class RunFolder:
    """Keeps the folder consistent; one run at a time has it.

    The main process makes its folder with ``begin`` or ``resume``. Other processes of a run write
    nothing, and help to gather weights; theirs is made without ``steps``.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any], steps: Any = None) -> None:
        self.folder, self.metadata = folder, dict(metadata)
        self._steps = steps  # steps.jsonl, to append to

    @classmethod
    def begin(
        cls,
        folder: Path,
        overwrite: bool,
        metadata: Mapping[str, Any],
        references: Mapping[str, Any] | None = None,
    ) -> "RunFolder":
        """A folder for a new run, which keeps the ``references`` to resume with.

        Raises ``UserError`` as ``check_run_folder`` and ``check_unused`` do.
        """
        check_run_folder(folder, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        check_unused(folder)
        for name in CONTENT:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        beginning = {"status": "running", "started": _now(), "versions": versions()}
        run = cls(folder, {**beginning, **metadata})
        run.note()
        run._steps = _locked(folder)
        if references:
            try:
                save_file(folder / REFERENCES, lambda file: save_tensors(references, file))
            except OSError as error:
                raise UserError(f"cannot save {folder / REFERENCES}: {error}") from error
        return run

    @classmethod
    def resume(cls, folder: Path, metadata: Mapping[str, Any], step: int) -> "RunFolder":
        """The folder as it was after ``step`` steps: later records are those of lost steps."""
        steps = _locked(folder)
        for file in (folder / STEPS, folder / EVALUATIONS):
            if file.exists():
                kept = [end for line, end in lines_of(file) if line["step"] <= step]
                os.truncate(file, kept[-1] if kept else 0)
        run = cls(folder, metadata, steps)
        recover(run._best)
        newest = [path for done, path in checkpoints_of(folder).items() if done <= step][-1:]
        for path in {*(folder / "checkpoints").glob("*")} - {run._best, *newest}:
            shutil.rmtree(path)
        for name in ("ended", "error"):
            run.metadata.pop(name, None)
        resumed = [*metadata.get("resumed", ()), {"step": step, "at": _now()}]
        run.note(status="running", resumed=resumed)
        return run

    def log(self, record: StepRecord) -> None:
        """Appends the record of a step to ``steps.jsonl``."""
        if is_main_process():
            self._steps.write(json.dumps(asdict(record)) + "\n")
            self._steps.flush()

    def log_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Appends an evaluation to ``evaluations.jsonl``, and waits until it is on the disk."""
        with (self.folder / EVALUATIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(evaluation) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations so far."""
        return [evaluation for evaluation, _ in lines_of(self.folder / EVALUATIONS)]

    def checkpoint(
        self, lm: CausalLM, tokenizer: Any, step: int, state: TrainState | None = None
    ) -> Path:
        """Model and tokenizer after ``step``, and with a ``state`` what it takes to go on.

        Once a checkpoint to go on from is complete, older ones are deleted.
        """
        folder = self.folder / "checkpoints" / f"step-{step:06d}"
        if is_main_process():
            os.fsync(self._steps.fileno())  # a checkpoint is never ahead of its step records
        save_model(lm, tokenizer, folder, None if state is None else state.writer(), replace=False)
        if is_main_process() and state is not None:
            for old in {*folder.parent.glob("step-*")} - {folder}:
                # out of sight first: what is half deleted must not look like a checkpoint
                shutil.rmtree(old.rename(old.with_name(old.name + ".old")))
        return folder

    def keep_best(self, lm: CausalLM, tokenizer: Any, evaluation: Mapping[str, Any]) -> None:
        """Saves the model as the best one, with its evaluation."""
        text = json.dumps(evaluation)
        save_model(lm, tokenizer, self._best, lambda new: (new / EVALUATION).write_text(text))

    def best(self) -> dict[str, Any]:
        """The evaluation of what ``keep_best`` kept; empty where it kept nothing."""
        file = self._best / EVALUATION
        return dict(read_json(file, EvaluationLine)) if file.exists() else {}

    def restore_best(self, lm: CausalLM) -> None:
        """The weights of ``keep_best``, in place."""
        read_weights(lm, self._best)

    @property
    def _best(self) -> Path:
        return self.folder / "checkpoints" / "best"

    def save_model(self, lm: CausalLM, tokenizer: Any) -> Path:
        """Saves the final model and tokenizer, in the dtype they came in; returns their folder.

        In memory the weights are rounded to it, so that they are those of the files.
        """
        dtype = lm.saved_dtype if lm.saved_dtype != lm.dtype and not lm.adapted else None
        if dtype is not None:
            lm.round_weights(dtype)
        save_model(lm, tokenizer, self.folder / "model", dtype=dtype)
        return self.folder / "model"

    def note(self, **metadata: Any) -> None:
        """Puts metadata into ``run.json`` at once."""
        self.metadata |= metadata
        if is_main_process():
            text = json.dumps(self.metadata, indent=2, default=str)
            save_file(self.folder / RUN, lambda file: file.write_text(text))

    def finish(self, status: str = "finished", **metadata: Any) -> None:
        """Closes the records and writes how the run ended into ``run.json``."""
        if is_main_process():
            self._steps.close()
            if status == "finished":  # nothing goes on from here
                (self.folder / REFERENCES).unlink(missing_ok=True)
        if torch.cuda.is_available():  # of the process so far: weights, training, evaluations
            metadata["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self.note(status=status, ended=_now(), **metadata)


def check_run_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds a run that came to its end, or anything that is not a run."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the output {folder} is a file; name a folder")
    partial = folder / f"{RUN}.partial"  # of a run that was killed before it began
    if not folder.exists() or not set(folder.iterdir()) - {partial}:
        return
    if not (folder / RUN).exists():
        raise UserError(f"the output {folder} holds files that are not a run; name another folder")
    if not overwrite and read_metadata(folder).get("status") not in UNFINISHED:
        raise UserError(
            f"the output {folder} holds a run that has ended; name another folder, or add "
            "--overwrite"
        )


def read_metadata(folder: Path) -> dict[str, Any]:
    """``run.json``, or {} where there is none; raises ``UserError`` where it is damaged."""
    if not (folder / RUN).exists():
        return {}
    return run_files.read_metadata(folder, "add --overwrite to begin anew")


def metadata_of_model(path: Path) -> dict[str, Any]:
    """``run.json`` of the run that made a model: its folder, or a model in it; else {}."""
    for folder in (path, *path.resolve().parents[:2]):
        if (folder / RUN).is_file():
            return read_metadata(folder)
    return {}


def check_unused(folder: Path) -> None:
    """Raises ``UserError`` where another process writes to the run in the folder."""
    if is_main_process() and (folder / STEPS).exists():
        _locked(folder).close()


def _locked(folder: Path) -> TextIO:
    """``steps.jsonl``, to append to; the lock ends with the process, however that ends."""
    file = (folder / STEPS).open("a", encoding="utf-8")
    try:
        lock(file, wait=False)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"another process writes to the run in {folder}; stop it or name another --output"
        ) from error
    return file


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """The complete checkpoints after steps, in their order."""
    paths = (folder / "checkpoints").glob("step-*")
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in paths)
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def lines_of(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line and where it ends; a process that was killed may leave half a line."""
    shape = StepLine if file.name == STEPS else EvaluationLine
    with suppress(UserError):
        yield from read_lines(file, shape)


def wait_for_all(lm: CausalLM) -> None:
    """Waits until the first rank has written; where it fails, the others are killed."""
    if lm.world_size > 1:
        all_reduce_max(0, lm.device)


def save_model(
    lm: CausalLM,
    tokenizer: Any,
    folder: Path,
    more: Callable[[Path], object] | None = None,
    replace: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Model and tokenizer, and what ``more`` writes, as one folder that is complete or absent.

    All processes call it: the weights of a sharded model are gathered, and the first one writes.
    """
    weights = None
    if lm.vocabulary_slice is not None:
        weights = gather_state_dict(lm.model.state_dict(keep_vars=True))

    def write(where: Path) -> None:
        with no_progress_bars():
            write_weights(lm, where, weights, dtype)
        save_tokenizer(tokenizer, where)
        if more is not None:
            more(where)

    if is_main_process() and (replace or not folder.exists()):
        save_folder(folder, write)
    wait_for_all(lm)


def save_file(file: Path, write: Callable[[Path], object]) -> None:
    """A file that is complete or absent: ``write`` fills it under another name."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        write(partial)
        sync(partial)
    except OSError:
        partial.unlink(missing_ok=True)  # else it keeps the disk full
        raise
    partial.replace(file)
    sync(file.parent)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
