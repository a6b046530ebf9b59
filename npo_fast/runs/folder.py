"""The folder of a run: settings and versions, step records, checkpoints, the final model.

run.json            what was asked for, with which versions, on which data, and how it ended
steps.jsonl         one step record a line, written as it happens
evaluations.jsonl   one evaluation a line, where any were asked for
retain-auto.jsonl   the model's own answers, where ``--retain auto`` made them what to keep
references.pt       log-probs of the model as it was, where the method compares with them
checkpoints/step-N  model, tokenizer and the state to go on from, complete or absent
checkpoints/best    model and tokenizer of the best evaluation, and that evaluation
model               the final model and tokenizer

With LoRA each of these models is the adapter alone. ``manifest.json`` in each of them names the run
and has the SHA-256 of every file (``model/manifest.py``), and of the records until then.
"""

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from npo_fast.boundary import read_json
from npo_fast.distributed import all_reduce_max, is_main_process
from npo_fast.errors import CannotSaveError, UserError
from npo_fast.model.adapters import read_weights
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.manifest import (
    MANIFEST,
    DamagedError,
    check_saved,
    sha256_of_file,
)
from npo_fast.model.save import recover, save_file, save_folder
from npo_fast.planner.disk import weights_bytes
from npo_fast.run_files import EVALUATIONS, OWN_ANSWERS, SHORTAGE, EvaluationLine
from npo_fast.runs.output import (
    check_run_folder,
    checkpoints_of,
    claimed,
    is_of_run,
    is_taken,
    is_vacant,
    remove_older,
)
from npo_fast.runs.records import Records
from npo_fast.runs.saved_model import BackgroundCheckpoint, save_checkpoint, save_model
from npo_fast.runs.saving import Saving, room
from npo_fast.trainer.settings import StepRecord
from npo_fast.trainer.state import TrainState, save_tensors
from npo_fast.versions import versions

REFERENCES, EVALUATION, BEST = "references.pt", "evaluation.json", "checkpoints/best"
CONTENT = (EVALUATIONS, REFERENCES, f"{REFERENCES}.partial", "checkpoints", "model", "eval",
           "eval-steps", OWN_ANSWERS, SHORTAGE)  # fmt: skip
logger = logging.getLogger(__name__)


class RunFolder:
    """Keeps the folder consistent; one run at a time has it.

    The main process makes its folder with ``begin`` or ``resume``. Other processes of a run write
    nothing, and help to gather weights; theirs is made without ``steps``.

    Records stay in memory: what is deleted while the run goes on is written again. Where the folder
    cannot be written, ``saving`` finds another one and the run moves there: ``folder`` is where it
    is now. Records and notes that do not fit wait for room.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any], steps: Any = None) -> None:
        self.folder, self.metadata = folder, dict(metadata)
        self.saving = Saving()
        self._records = Records(folder, self.metadata, steps)
        self._references: Mapping[str, Any] = {}
        self._best_step: int | None = None
        self._background: BackgroundCheckpoint | None = None

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
        run._records.save_metadata()
        if references:
            run._references = references
            run._write_references()
            run._records.save_metadata()
        return run

    @classmethod
    def resume(
        cls,
        folder: Path,
        metadata: Mapping[str, Any],
        found: bytes | None,
        facts: Mapping[str, Any],
        trained: bool,
    ) -> "RunFolder":
        """The folder as it was when the manifest with these ``facts`` was written.

        Records and checkpoints of later steps are deleted, and what ``run.json`` says of a final
        model, unless that is where the run goes on: it was ``trained``.
        """
        run, step = cls(folder, metadata, claimed(folder, found)), facts["step"]
        run._records.resume(facts["records"])
        recover(run._best)
        if facts["best"] is None and run._best.exists():  # of a step that is made again
            shutil.rmtree(run._best)
        run._best_step = facts["best"]
        newest = [path for done, path in checkpoints_of(folder).items() if done <= step][-1:]
        for path in {*(folder / "checkpoints").glob("*")} - {run._best, *newest}:
            shutil.rmtree(path)
        for name in ("ended", "error"):
            run.metadata.pop(name, None)
        for name in () if trained else ("final", "best"):
            run.metadata.pop(name, None)
        resumed = [*metadata.get("resumed", ()), {"step": step, "at": _now()}]
        run.note(status="running", resumed=resumed)
        return run

    def log(self, record: StepRecord) -> None:
        """Appends the record of a step to ``steps.jsonl``."""
        if is_main_process():
            self._restore_lost()
            self._records.steps.append(record.as_dict())

    def log_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Appends an evaluation to ``evaluations.jsonl``, and waits until it is on the disk."""
        if is_main_process():
            self._restore_lost()
            self._records.evaluations.append(evaluation, sync=True)

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations so far."""
        return self._records.evaluations.records()

    def last_step(self) -> StepRecord | None:
        """The record of the last step; None before the first."""
        records = self._records.steps.records()
        return StepRecord(**records[-1]) if records else None

    def checkpoint(
        self,
        lm: CausalLM,
        tokenizer: Any,
        step: int,
        state: TrainState | None = None,
        insist: bool = False,
    ) -> Path | None:
        """Model and tokenizer after ``step``, and with a ``state`` what it takes to go on.

        Once a checkpoint to go on from is complete, older ones are deleted. Several processes go on
        while it is written: ``finished_checkpoint`` tells when it is complete.

        Args:
            insist: nothing comes after it, so that it must be saved, be it elsewhere.

        Returns:
            Its folder; None where it is not complete yet, or could not be written and the run can
            go on without.
        """
        name = f"checkpoints/step-{step:06d}"
        self.finished_checkpoint(lm, wait=True)
        try:
            if lm.world_size > 1 and state is not None and not insist:
                self._before_checkpoint()
                self._background = BackgroundCheckpoint(
                    lm, tokenizer, self.folder / name, state, self.facts(step)
                )
                return None
            more = None if state is None else state.writer()
            self._save(name, lm, tokenizer, step, more, False, insist=insist, state=state)
        except CannotSaveError as error:
            if insist:
                raise
            self._warn_of_no_checkpoint(step, error)
            return None
        if state is not None:
            remove_older(self.folder / name)
        return self.folder / name

    def finished_checkpoint(self, lm: CausalLM, wait: bool = False) -> Path | None:
        """The checkpoint that has been written in the background and is complete now, if any.

        Several processes call it together.
        """
        background = self._background
        if background is None or not (wait or background.is_written(lm)):
            return None
        self._background = None
        try:
            background.complete()
        except CannotSaveError as error:
            self._warn_of_no_checkpoint(background.facts["step"], error)
            return None
        remove_older(background.folder)
        return background.folder

    def _warn_of_no_checkpoint(self, step: int, error: CannotSaveError) -> None:
        logger.warning(
            f"WARNING: NO CHECKPOINT at step {step}: {error}. {room(self.folder)}; training goes "
            "on, and the next one is tried"
        )

    def _before_checkpoint(self) -> None:  # which is never ahead of its records
        if is_main_process():
            self._restore_lost()
            self._records.steps.flush()

    def keep_best(self, lm: CausalLM, tokenizer: Any, evaluation: Mapping[str, Any]) -> None:
        """Saves the model as the best one, with its evaluation."""
        self._best_step, text = evaluation["step"], json.dumps(evaluation)
        self._save(
            BEST, lm, tokenizer, evaluation["step"], lambda new: (new / EVALUATION).write_text(text)
        )

    def best(self) -> dict[str, Any]:
        """The evaluation of what ``keep_best`` kept; empty where it kept nothing."""
        file = self._best / EVALUATION
        return dict(read_json(file, EvaluationLine)) if file.exists() else {}

    def restore_best(self, lm: CausalLM) -> None:
        """The weights of ``keep_best``, in place; ``UserError`` where they are lost."""
        try:
            check_saved(self._best, self.metadata.get("id"))
        except DamagedError as error:
            raise UserError(f"the best model is lost: {error}") from error
        read_weights(lm, self._best)

    @property
    def _best(self) -> Path:
        return self.folder / BEST

    def save_model(self, lm: CausalLM, tokenizer: Any, step: int) -> Path:
        """Saves the final model and tokenizer, in the dtype they came in; returns their folder.

        In memory the weights are rounded to it, so that they are those of the files.
        """
        dtype = lm.saved_dtype if lm.saved_dtype != lm.dtype and not lm.adapted else None
        if dtype is not None:
            lm.round_weights(dtype)
        self._save("model", lm, tokenizer, step, dtype=dtype)
        return self.folder / "model"

    def save_lost_model(self, lm: CausalLM, tokenizer: Any) -> None:
        """Saves the final model again where it was deleted meanwhile."""
        lost = is_main_process() and not (self.folder / "model" / MANIFEST).is_file()
        if all_reduce_max(int(lost), lm.device):
            path = self.save_model(lm, tokenizer, self.metadata["final"]["step"])
            logger.warning(
                f"warning: the model was deleted meanwhile, and is saved again in {path}"
            )

    def note(self, **metadata: Any) -> None:
        """Puts metadata into ``run.json`` at once; what cannot be written waits for ``finish``."""
        self.metadata |= metadata
        if is_main_process():
            self._restore_lost()
            self._records.try_to(self._records.save_metadata)

    def finish(self, status: str = "finished", **metadata: Any) -> None:
        """Closes the records and writes how the run ended into ``run.json``."""
        if torch.cuda.is_available():  # of the process so far: weights, training, evaluations
            metadata["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self.metadata |= {"status": status, "ended": _now(), **metadata}
        if not is_main_process():
            return
        self._restore_lost()
        if status != "finished":
            self._records.try_to(self._records.save)
        else:
            try:
                self.saving.insist(self.folder, lambda _: self._records.save(), elsewhere=False)
            except CannotSaveError as error:
                raise CannotSaveError(f"{error}; the model in {self.folder} is complete") from error
            with suppress(OSError):
                (self.folder / REFERENCES).unlink(missing_ok=True)  # nothing goes on from here
        self._records.close()

    def _save(
        self, name: str, lm: CausalLM, tokenizer: Any, step: int,
        more: Callable[[Path], object] | None = None,
        replace: bool = True, dtype: torch.dtype | None = None, insist: bool = True,
        state: TrainState | None = None,
    ) -> None:  # fmt: skip
        """``save_model`` into the folder ``name``; where it has to ``insist``, the run may move."""

        def put(folder: Path, write: Callable[[Path], None]) -> None:
            def attempt(root: Path) -> None:
                if root == self.folder:
                    self._before_checkpoint()
                elif not (is_vacant(root) or is_of_run(root, self.metadata.get("id"))):
                    raise CannotSaveError(f"{root} is not empty")
                else:
                    self._records.reserve(root)
                save_folder(root / name, write)

            if not insist:
                attempt(self.folder)
                return
            root = self.saving.insist(self.folder, attempt, weights_bytes(lm.model, dtype))
            if root != self.folder:
                self._move(root)

        folder, facts = self.folder / name, self.facts(step)
        if lm.world_size > 1 and state is not None:
            save_checkpoint(lm, tokenizer, folder, state, facts, put)
        else:
            save_model(lm, tokenizer, folder, more, replace, dtype, facts, put)

    def _move(self, root: Path) -> None:
        """Goes on in ``root``, where a model of this run is saved already; its records follow."""
        left, self.folder = self.folder, root
        logger.warning(f"THE RUN IS IN {root} FROM HERE ON: {left} could not be written")
        newest = [path.relative_to(left) for path in checkpoints_of(left).values()][-1:]
        kept: list[str | Path] = [REFERENCES, BEST, *([] if checkpoints_of(root) else newest)]
        for name in kept:
            source, target = left / name, root / name
            if source.exists() and not target.exists():
                partial = target.with_name(f"{target.name}.partial")
                with suppress(OSError):
                    partial.parent.mkdir(parents=True, exist_ok=True)
                    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, partial)
                    partial.rename(target)
        self._records.move(root)

    def facts(self, step: int) -> dict[str, Any]:
        """What a manifest says beside the files: enough to find what is of another run or time."""
        run, records = self.metadata.get("id"), self._records.states()
        return {"run": run, "step": step, "best": self._best_step, "records": records}

    def _write_references(self) -> None:
        file = self.folder / REFERENCES
        try:
            save_file(file, lambda partial: save_tensors(self._references, partial))
        except OSError as error:
            raise CannotSaveError(f"cannot save {file}: {error}") from error
        self.metadata["references_sha256"] = sha256_of_file(file)

    def _restore_lost(self) -> None:
        """Writes again what was deleted or cut while the run goes on, and says so.

        Another run may be in its place by now; then this one goes on beside it.
        """
        lost = self._records.lost()
        if not lost:
            return
        before, beside = self.folder, ""
        try:
            if not self._records.is_locked and is_taken(before, self.metadata["id"]):
                self.folder = before.with_name(f"{before.name}-{self.metadata['id']}")
                beside = f" in {self.folder}, for another run has its place"
            self._records.restore(self.folder)
            if self._references and not (self.folder / REFERENCES).exists():
                self._write_references()
        except (CannotSaveError, OSError) as error:
            logger.debug(f"not restored yet: {error}")  # whoever writes next says so
            return
        logger.warning(
            f"warning: {', '.join(lost)} of the run in {before} went missing or changed while it "
            f"goes on: written again from memory{beside}. Checkpoints that went with them are lost"
        )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
