"""One training run in a folder: steps, callbacks, and what is kept when it ends in any way."""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from npo_fast import watch
from npo_fast.distributed import (
    broadcast_object,
    is_lost_contact,
    is_main_process,
    launch,
    leave,
    world_size,
)
from npo_fast.errors import (
    CannotSaveError,
    Interrupted,
    NonFiniteError,
    OutOfMemory,
    PartialUpdateError,
    PartialUpdateOutOfMemory,
    SharedOutOfMemory,
)
from npo_fast.metrics.verdict import Verdict
from npo_fast.model.adapters import merge_adapter, read_weights
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.reference_states import ReferenceStates
from npo_fast.runs import hub
from npo_fast.runs.callbacks import (
    CheckpointCallback,
    EvaluationCallback,
    TrackerCallback,
    Training,
)
from npo_fast.runs.folder import RunFolder
from npo_fast.runs.preparing import PreparedRun
from npo_fast.runs.progress import ProgressBar
from npo_fast.runs.resume import note_shortage
from npo_fast.runs.run import Run
from npo_fast.runs.saved_model import wait_for_all
from npo_fast.runs.saving import Saving
from npo_fast.trainer.interrupt import StopSignal
from npo_fast.trainer.loop import train
from npo_fast.trainer.settings import StepRecord
from npo_fast.trainer.state import TrainState
from npo_fast.trainer.step import References

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceData:
    """What only the model before training can tell: measured before the first step."""

    before: Mapping[str, Any] = field(default_factory=dict)  # of the report
    log_probs: References | None = None
    hidden: ReferenceStates | None = None


class Shortage(Exception):  # noqa: N818 - an end of training that the run survives
    """Raised where several processes have to begin a step again, with the model made anew."""

    def __init__(
        self, reason: str, state: TrainState, metadata: dict[str, Any], facts: Mapping[str, Any]
    ) -> None:
        super().__init__(reason)
        self.state, self.metadata, self.facts = state, metadata, facts


def with_enough_memory(prepared: PreparedRun, run: Callable[[PreparedRun], Run]) -> Run:
    """Calls ``run``, again and again where one of several processes has no memory for a step.

    ``run`` loads the model and trains it. It goes on from the weights and the optimizer states that
    each process holds, in smaller micro-batches.
    """
    while True:
        try:
            return run(prepared)
        except Shortage as shortage:
            if prepared.model.in_memory is not None:
                raise OutOfMemory(
                    f"{shortage}, and the model in memory is divided among processes that have "
                    "parted: start them again with smaller micro_batch_tokens"
                ) from None
            prepared = prepared.resumed(shortage.state, shortage.metadata, shortage.facts)
        gc.collect()  # outside of the handler, where the error no longer holds the model


def run_training(
    lm: CausalLM,
    prepared: PreparedRun,
    reference: ReferenceData = ReferenceData(),
    evaluation: EvaluationCallback | None = None,
    closing: Callable[[RunFolder], Mapping[str, Any]] = lambda folder: {},
) -> Run:
    """Trains in a run folder, or goes on with a run that did not end.

    Args:
        evaluation: the callback that evaluates while training.
        closing: what ``run.json`` says of the final model.
    """
    options, resumable = prepared.options, prepared.resumable
    tokenizer = prepared.template.tokenizer
    state = TrainState() if resumable is None else resumable.state
    trackers = [] if options.track is None else [TrackerCallback(options.track)]
    if options.push_to_hub is not None and is_main_process():
        hub.create_repository(options.push_to_hub)  # first: it may refuse
    folder = _open_folder(lm, prepared, reference, evaluation)
    signal = StopSignal()
    folder.saving = Saving(
        options.fallback_output, options.save_wait, lambda: signal.number, gives_up=False
    )
    training = Training(folder, lm, tokenizer, prepared.training, state, [
        *([] if evaluation is None else [evaluation]),
        CheckpointCallback(options.save_every, signal), *trackers,
        ProgressBar(options.output.name), *prepared.callbacks,
    ], options)  # fmt: skip
    for callback in training.callbacks:
        callback.should_stop = None  # it may have stopped an earlier run
    try:
        with signal, _closed(training):  # signals wait until the folder says how it ended
            training.emit("on_start", training)
            if evaluation is not None and resumable is None:
                training.emit("on_evaluation", evaluation.first)
            if "final" not in folder.metadata:
                steps = train(
                    lm, prepared.sources, prepared.terms, prepared.training,
                    reference.log_probs, reference.hidden, state,
                )  # fmt: skip
                _run_steps(training, steps, options.merge)
            if signal.number:
                raise Interrupted(
                    f"interrupted after the last step; {training.hint} makes the report",
                    signal.number,
                )
        with _closed(training):
            outcome = closing(folder)
    finally:
        training.emit_end()
    folder.save_lost_model(lm, tokenizer)
    folder.finish("finished", **outcome)
    wait_for_all(lm)  # the others read what the first process has written
    if is_main_process():
        scores = folder.metadata.get("best") or [{}, *folder.evaluations()][-1]
        try:
            hub.write_card(folder.folder / "model", folder.metadata, scores)
        except OSError as error:
            logger.warning(f"warning: the model is saved, and its card cannot be written: {error}")
        if options.push_to_hub is not None:
            hub.upload(folder.folder / "model", options.push_to_hub)
    if folder.saving.left_by_itself is not None:
        if "verdict" in folder.metadata:
            logger.info(f"verdict: {Verdict.of(folder.metadata['verdict'])}")
        raise CannotSaveError(
            f"--output {options.output} could not be written: the run is complete, with its model, "
            f"in {folder.folder}. Move it to where it may stay"
        )
    return Run(folder.folder, lm.model, tokenizer)


def _run_steps(training: Training, steps: Iterator[StepRecord], merge: bool) -> None:
    """Every step with its record and callbacks, then the final model."""
    folder, lm = training.folder, training.lm
    tokens = training.state.micro_batch_tokens or training.settings.micro_batch_tokens
    record = None
    for record in steps:
        training.between_steps = True
        folder.log(record)
        if record.micro_batch_tokens < tokens:
            tokens = record.micro_batch_tokens
            logger.info(f"out of memory at step {record.step}: {tokens} tokens at a time from here")
            folder.note(micro_batch_tokens=tokens)
        training.emit("on_step", record)
        if (reason := training.stop_reason()) is not None:
            logger.info(f"stopped: {reason}")
            break
        training.between_steps = False
    if record is None:  # resumed after the last step, whose final model was lost
        record = folder.last_step()
    if record is None:
        return
    training.between_steps = True
    training.emit("on_trained")
    training.between_steps = not merge
    if merge:
        merge_adapter(lm)
    logger.info("saving the model")
    path = folder.save_model(lm, training.tokenizer, record.step)
    width = str(lm.saved_dtype).removeprefix("torch.")
    rounded = f", rounded to {width} as it came (--dtype fp32 keeps fp32)"
    is_narrower = lm.saved_dtype is not None and lm.saved_dtype.itemsize < lm.dtype.itemsize
    logger.info(f"model saved in {path}{rounded if is_narrower and not lm.adapted else ''}")
    if record.kept_utility is not None:
        logger.info(
            f"--keep-utility {training.settings.keep_utility:g}: retain coefficient "
            f"{record.retain_coefficient:.3g}; {record.kept_utility:.1%} of the retain answers' "
            "probability is left"
        )
    training.between_steps = False  # what is saved is saved
    folder.note(final=record.as_dict(), **training.final_metadata)


@contextmanager
def _closed(training: Training) -> Iterator[None]:
    """Whatever ends the run, ``run.json`` says so, and the folder keeps what it takes to go on."""
    folder, lm, state = training.folder, training.lm, training.state
    try:
        yield
    except NonFiniteError as error:
        kept = "no step was taken, so there is nothing to keep"
        if isinstance(error, PartialUpdateError):
            kept = "nothing was saved of them; earlier checkpoints stay where they are"
        elif state.step:
            path = folder.checkpoint(lm, training.tokenizer, state.step, insist=True)
            kept = f"that model is in {path}, earlier checkpoints beside it"
        folder.finish("stopped", error=str(error))
        wait_for_all(lm)
        raise type(error)(f"{error}. {kept[0].upper()}{kept[1:]}") from error
    except SharedOutOfMemory as error:
        if not error.meets:
            note_shortage(folder.folder, training.settings, error.micro_batch_tokens)
            raise OutOfMemory(
                f"{error}. {training.hint[0].upper()}{training.hint[1:]} goes on, with "
                f"{error.micro_batch_tokens} tokens at a time (torchrun --max-restarts 3: by "
                "itself); --gradient-checkpointing makes room for more"
            ) from error
        step, facts = state.step, folder.facts(state.step)
        held = state.held(error.micro_batch_tokens)
        folder.finish("interrupted", error=str(error))
        leave()
        logger.warning(f"{error}: all go on after step {step} with half of the tokens at a time")
        raise Shortage(str(error), held, dict(folder.metadata), facts) from None
    except OutOfMemory as error:
        complete = not isinstance(error, PartialUpdateOutOfMemory)
        if state.step and complete and world_size() == 1:  # else others are still in the step
            folder.checkpoint(lm, training.tokenizer, state.step, state, insist=True)
        folder.finish("interrupted", error=str(error))
        raise OutOfMemory(
            f"{error}. Where there is more memory, {training.hint} goes on"
        ) from error
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, Interrupted):
            _keep_steps(training)
        reason = f"{type(error).__name__}: {error}"
        if world_size() > 1 and is_lost_contact(error):
            reason = f"lost contact with another process: {watch.failure_of_others() or reason}"
        folder.finish("interrupted", error=reason)
        if isinstance(error, Interrupted):
            wait_for_all(lm)
        raise


def _keep_steps(training: Training) -> None:
    """Where an evaluation or a callback fails, a checkpoint of the steps until then."""
    folder, lm, state = training.folder, training.lm, training.state
    if not training.between_steps or world_size() > 1:  # the others are elsewhere
        return
    try:
        path = folder.checkpoint(lm, training.tokenizer, state.step, state, insist=True)
        logger.warning(f"the model after step {state.step} is in {path}: {training.hint} goes on")
    except Exception as error:
        logger.warning(f"WARNING: the model after step {state.step} cannot be kept: {error}")


def _open_folder(
    lm: CausalLM,
    prepared: PreparedRun,
    reference: ReferenceData,
    evaluation: EvaluationCallback | None,
) -> RunFolder:
    """A new run folder, or the folder of the resumed run with its weights read into ``lm``."""
    options, resumable = prepared.options, prepared.resumable
    metadata = {**prepared.metadata, "attention": lm.attention}
    if reference.hidden is not None:
        metadata["reference"] = reference.hidden.made_from
    if resumable is None:
        # evaluated first: it may refuse, and the folder may hold an earlier run
        scores = None if evaluation is None else evaluation.check(lm)
        if reference.before:
            metadata["before"] = reference.before
        if not is_main_process():
            return RunFolder(options.output, metadata)
        metadata |= {"processes": world_size(), "threads": torch.get_num_threads()}
        metadata["launch"] = launch()
        metadata["chain"] = prepared.link()
        folder = RunFolder.begin(
            options.output, options.overwrite, metadata, prepared.found, reference.log_probs
        )
        if scores is not None:
            folder.log_evaluation(scores)
        return folder
    resumable.check(metadata)
    if resumable.trained and options.merge:
        merge_adapter(lm)
    if resumable.state.weights:
        resumable.state.restore_weights(lm)
    else:
        assert resumable.weights is not None
        read_weights(lm, resumable.weights)
    if is_main_process():
        folder = RunFolder.resume(
            resumable.folder, resumable.metadata, prepared.found, resumable.facts,
            resumable.trained,
        )  # fmt: skip
    else:
        folder = RunFolder(options.output, resumable.metadata)
    if evaluation is not None and not resumable.trained:
        evaluation.load_state(*broadcast_object((folder.evaluations(), folder.best())))
    return folder
