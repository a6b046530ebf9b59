"""The folder of a run: settings and versions, step records, checkpoints, the final model.

run.json            what was asked for, with which versions, on which data, and how it ended
steps.jsonl         one step record a line, written as it happens
evaluations.jsonl   one evaluation a line, where any were asked for
references.pt       log-probs of the model as it was, where the method compares with them
checkpoints/step-N  model, tokenizer and the state to go on from, complete or absent
checkpoints/best    model and tokenizer of the best evaluation, and that evaluation
model               the final model and tokenizer

With LoRA each of these models is the adapter alone. ``manifest.json`` in each of them names the run
and has the SHA-256 of every file (``model/manifest.py``), and of the records until then.
"""

import json
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from npo_fast.distributed import all_reduce_max, is_main_process
from npo_fast.errors import UserError
from npo_fast.model.adapters import no_progress_bars, read_weights, write_weights
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.manifest import (
    MANIFEST,
    DamagedError,
    check_saved,
    sealed,
    sha256_of_file,
    write_manifest,
)
from npo_fast.model.save import recover, save_folder, save_tokenizer, sync
from npo_fast.model.sharding import gather_state_dict
from npo_fast.runs.output import (
    RUN,
    STEPS,
    check_run_folder,
    claimed,
    is_open_file,
    is_taken,
    locked_records,
)
from npo_fast.runs.records import RecordFile
from npo_fast.trainer.settings import StepRecord
from npo_fast.trainer.state import TrainState, save_tensors
from npo_fast.versions import versions

EVALUATIONS, REFERENCES, EVALUATION = "evaluations.jsonl", "references.pt", "evaluation.json"
CONTENT = (EVALUATIONS, REFERENCES, f"{REFERENCES}.partial", "checkpoints", "model", "eval",
           "eval-steps")  # fmt: skip
logger = logging.getLogger(__name__)


class RunFolder:
    """Keeps the folder consistent; one run at a time has it.

    The main process makes its folder with ``begin`` or ``resume``. Other processes of a run write
    nothing, and help to gather weights; theirs is made without ``steps``. Records stay in memory:
    where they or ``run.json`` are deleted while the run goes on, they are written again.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any], steps: Any = None) -> None:
        self.folder, self.metadata = folder, dict(metadata)
        self._lock = steps  # steps.jsonl, open and locked
        self._records = {name: RecordFile(folder / name) for name in (STEPS, EVALUATIONS)}
        self._references: Mapping[str, Any] = {}
        self._best_step: int | None = None

    @classmethod
    def begin(
        cls,
        folder: Path,
        overwrite: bool,
        metadata: Mapping[str, Any],
        found: bytes | None,
        references: Mapping[str, Any] | None = None,
    ) -> "RunFolder":
        """A folder for a new run, which keeps the ``references`` to resume with.

        Args:
            found: ``run.json`` when the folder was looked at, of a run that may go.

        Raises:
            UserError: as ``check_run_folder``; another process has the folder, or had it meanwhile.
        """
        check_run_folder(folder, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        steps = claimed(folder, found)  # before anything is deleted
        for name in CONTENT:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        steps.truncate(0)
        beginning = {
            "id": secrets.token_hex(8),
            "status": "running",
            "started": _now(),
            "versions": versions(),
        }
        run = cls(folder, {**beginning, **metadata}, steps)
        run._write_metadata()
        if references:
            run._references = references
            run._write_references()
            run._write_metadata()
        return run

    @classmethod
    def resume(
        cls,
        folder: Path,
        metadata: Mapping[str, Any],
        found: bytes | None,
        facts: Mapping[str, Any],
    ) -> "RunFolder":
        """The folder as it was when the manifest with these ``facts`` was written.

        Records and checkpoints of later steps are deleted.
        """
        run, step = cls(folder, metadata, claimed(folder, found)), facts["step"]
        run._records = {
            name: RecordFile.resume(folder / name, state)
            for name, state in facts["records"].items()
        }
        recover(run._best)
        if facts["best"] is None and run._best.exists():  # of a step that is made again
            shutil.rmtree(run._best)
        run._best_step = facts["best"]
        newest = [path for done, path in checkpoints_of(folder).items() if done <= step][-1:]
        for path in {*(folder / "checkpoints").glob("*")} - {run._best, *newest}:
            shutil.rmtree(path)
        for name in ("ended", "error"):
            run.metadata.pop(name, None)
        if run.metadata.get("final", {}).get("step") != step:  # its model is damaged
            for name in ("final", "best"):
                run.metadata.pop(name, None)
        resumed = [*metadata.get("resumed", ()), {"step": step, "at": _now()}]
        run.note(status="running", resumed=resumed)
        return run

    def log(self, record: StepRecord) -> None:
        """Appends the record of a step to ``steps.jsonl``."""
        if is_main_process():
            self._restore_lost()
            self._records[STEPS].append(asdict(record))

    def log_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Appends an evaluation to ``evaluations.jsonl``, and waits until it is on the disk."""
        self._restore_lost()
        self._records[EVALUATIONS].append(evaluation, sync=True)

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations so far."""
        return self._records[EVALUATIONS].records()

    def checkpoint(
        self, lm: CausalLM, tokenizer: Any, step: int, state: TrainState | None = None
    ) -> Path:
        """Model and tokenizer after ``step``, and with a ``state`` what it takes to go on.

        Once a checkpoint to go on from is complete, older ones are deleted.
        """
        if is_main_process():
            self._restore_lost()
            sync(self.folder / STEPS)  # a checkpoint is never ahead of its step records
        folder = self.folder / "checkpoints" / f"step-{step:06d}"
        more = None if state is None else state.writer()
        save_model(lm, tokenizer, folder, more, replace=False, facts=self._facts(step))
        if is_main_process() and state is not None:
            for old in {*folder.parent.glob("step-*")} - {folder}:
                # out of sight first: what is half deleted must not look like a checkpoint
                shutil.rmtree(old.rename(old.with_name(old.name + ".old")))
        return folder

    def keep_best(self, lm: CausalLM, tokenizer: Any, evaluation: Mapping[str, Any]) -> None:
        """Saves the model as the best one, with its evaluation."""
        self._best_step, text = evaluation["step"], json.dumps(evaluation)
        save_model(
            lm, tokenizer, self._best, lambda new: (new / EVALUATION).write_text(text),
            facts=self._facts(evaluation["step"]),
        )  # fmt: skip

    def best(self) -> dict[str, Any]:
        """The evaluation of what ``keep_best`` kept; empty where it kept nothing."""
        file = self._best / EVALUATION
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def restore_best(self, lm: CausalLM) -> None:
        """The weights of ``keep_best``, in place; ``UserError`` where they are lost."""
        try:
            check_saved(self._best, self.metadata.get("id"))
        except DamagedError as error:
            raise UserError(f"the best model is lost: {error}") from error
        read_weights(lm, self._best)

    @property
    def _best(self) -> Path:
        return self.folder / "checkpoints" / "best"

    def save_model(self, lm: CausalLM, tokenizer: Any, step: int) -> Path:
        """Saves the final model and tokenizer, in the dtype they came in; returns their folder.

        In memory the weights are rounded to it, so that they are those of the files.
        """
        if is_main_process():
            self._restore_lost()
        dtype = lm.saved_dtype if lm.saved_dtype != lm.dtype and not lm.adapted else None
        if dtype is not None:
            lm.round_weights(dtype)
        folder = self.folder / "model"
        save_model(lm, tokenizer, folder, dtype=dtype, facts=self._facts(step))
        return folder

    def save_lost_model(self, lm: CausalLM, tokenizer: Any) -> None:
        """Saves the final model again where it was deleted meanwhile."""
        lost = is_main_process() and not (self.folder / "model" / MANIFEST).is_file()
        if all_reduce_max(int(lost), lm.device):
            path = self.save_model(lm, tokenizer, self.metadata["final"]["step"])
            logger.warning(
                f"warning: the model was deleted meanwhile, and is saved again in {path}"
            )

    def note(self, **metadata: Any) -> None:
        """Puts metadata into ``run.json`` at once."""
        self.metadata |= metadata
        if is_main_process():
            self._restore_lost()
            self._write_metadata()

    def finish(self, status: str = "finished", **metadata: Any) -> None:
        """Closes the records and writes how the run ended into ``run.json``."""
        if torch.cuda.is_available():  # of the process so far: weights, training, evaluations
            metadata["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self.note(status=status, ended=_now(), **metadata)
        if is_main_process():
            self._lock.close()
            if status == "finished":  # nothing goes on from here
                (self.folder / REFERENCES).unlink(missing_ok=True)

    def _facts(self, step: int) -> dict[str, Any]:
        """What a manifest says beside the files: enough to find what is of another run or time."""
        records = {name: file.state() for name, file in self._records.items()}
        run = self.metadata.get("id")
        return {"run": run, "step": step, "best": self._best_step, "records": records}

    def _write_metadata(self) -> None:
        text = json.dumps(sealed(self.metadata), indent=2)
        save_file(self.folder / RUN, lambda file: file.write_text(text))

    def _write_references(self) -> None:
        file = self.folder / REFERENCES
        try:
            save_file(file, lambda partial: save_tensors(self._references, partial))
        except OSError as error:
            raise UserError(f"cannot save {file}: {error}") from error
        self.metadata["references_sha256"] = sha256_of_file(file)

    def _restore_lost(self) -> None:
        """Writes again what was deleted or cut while the run goes on, and says so.

        Another run may be in its place by now; then this one goes on beside it.
        """
        lost = [name for name, file in self._records.items() if not file.is_whole()]
        is_locked = is_open_file(self._lock, self.folder / STEPS)
        lost += [] if is_locked or STEPS in lost else [STEPS]
        lost += [] if (self.folder / RUN).is_file() else [RUN]
        if not lost:
            return
        before, beside = self.folder, ""
        if not is_locked and is_taken(before, self.metadata["id"]):
            self.folder = before.with_name(f"{before.name}-{self.metadata['id']}")
            beside = f" in {self.folder}, for another run has its place"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not is_open_file(self._lock, self.folder / STEPS):
            self._lock.close()
            self._lock = locked_records(self.folder)
        for name, file in self._records.items():
            file.restore(self.folder / name)
        if self._references and not (self.folder / REFERENCES).exists():
            self._write_references()
        self._write_metadata()
        logger.warning(
            f"warning: {', '.join(lost)} of the run in {before} went missing or changed while it "
            f"goes on: written again from memory{beside}. Checkpoints that went with them are lost"
        )


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """The complete checkpoints after steps, in their order."""
    paths = (folder / "checkpoints").glob("step-*")
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in paths)
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


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
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Model and tokenizer, and what ``more`` writes, as one folder that is complete or absent.

    Its manifest holds the ``facts``.

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
        write_manifest(where, **facts)

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
