"""Callbacks of a training run: what happens after a step, an evaluation, a checkpoint.

Evaluation while training, the best model, the checkpoints, trackers and the progress bar are
callbacks; write your own by deriving from ``Callback``.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from npo_fast import watch
from npo_fast.distributed import all_reduce_max, is_main_process
from npo_fast.errors import Interrupted, UserError
from npo_fast.metrics import Result
from npo_fast.metrics.measures import Condition, find_measure, measures, value_of
from npo_fast.model.causal_lm import CausalLM
from npo_fast.run_files import EVALUATIONS
from npo_fast.runs.folder import RunFolder
from npo_fast.runs.options import EvaluationOptions, RunOptions, Tracker
from npo_fast.trainer.interrupt import StopSignal
from npo_fast.trainer.settings import StepRecord, TrainSettings
from npo_fast.trainer.state import TrainState

logger = logging.getLogger(__name__)


class Callback:
    """The hooks of a run, in the order in which they are called; override what you need.

    Set ``should_stop`` to a reason, in any hook, to end the training after the current step; the
    model is then saved as after the last step. Several processes all call every hook.
    """

    should_stop: str | None = None

    def on_start(self, training: "Training") -> None:
        """Called before the first step, with the model, the folder and the settings at hand."""

    def on_step(self, record: StepRecord) -> None:
        """Called after every optimizer step."""

    def on_evaluation(self, scores: Mapping[str, Any]) -> None:
        """Called with the measures of every evaluation while training, step 0 included."""

    def on_checkpoint(self, path: Path) -> None:
        """Called when a checkpoint is complete on the disk."""

    def on_trained(self) -> None:
        """Called after the last step, before the final model is saved."""

    def on_end(self) -> None:
        """Called when the run has ended, with an error too: close what is open."""


@dataclass
class Training:
    """A run while it trains: what callbacks see."""

    folder: RunFolder
    lm: CausalLM
    tokenizer: Any
    settings: TrainSettings
    state: TrainState
    callbacks: list[Callback]
    options: RunOptions
    between_steps: bool = False  # the weights are those of ``state``, whole
    final_metadata: dict[str, Any] = field(default_factory=dict)  # for run.json, with the model

    @property
    def hint(self) -> str:
        """What to start again to go on with this run, in words."""
        moved = self.folder.folder != self.options.output
        where = f" with --output {self.folder.folder}" if moved else ""
        return f"the same command{where}" + (" without --overwrite" * self.options.overwrite)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files; the others take part in the steps alone."""
        return is_main_process()

    def emit(self, hook: str, *arguments: Any) -> None:
        """Calls the hook of every callback."""
        for callback in self.callbacks:
            getattr(callback, hook)(*arguments)

    def emit_end(self) -> None:
        """Calls ``on_end`` of every callback; one that fails keeps none of the others from it."""
        for callback in self.callbacks:
            try:
                callback.on_end()
            except Exception:
                logger.exception(f"{type(callback).__name__}.on_end failed")

    def stop_reason(self) -> str | None:
        """The first reason that a callback gives to end the training."""
        return next((str(c.should_stop) for c in self.callbacks if c.should_stop), None)


class EvaluationCallback(Callback):
    """Evaluates every ``eval_every`` steps, keeps the best model, and says when to stop.

    Args:
        evaluate: measures a model as it is.
        retrained: logs of the retrained model on the same items, for forget quality.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        evaluate: Callable[[CausalLM], Result],
        retrained: Result | None = None,
    ) -> None:
        self.options, self.evaluate, self.retrained = options, evaluate, retrained
        self.condition = None if options.stop_when is None else Condition.parse(options.stop_when)
        self.first: dict[str, Any] = {}
        self.best: dict[str, Any] = {}  # empty until an evaluation after step 0 qualifies
        self.pending: StepRecord | None = None  # the last step, where it was not evaluated

    def check(self, lm: CausalLM) -> dict[str, Any]:
        """The evaluation of step 0; ``UserError`` if it lacks a measure that the options name."""
        self.first = self._scores(lm, 0, 0.0)
        if self.options.keep_best is not None:
            value_of(self.first, self.options.keep_best)
        if self.condition is not None:
            value_of(self.first, self.condition.measure)
        if self.options.min_utility and not value_of(self.first, "model_utility") > 0:
            raise UserError(
                "--min-utility is a share of the utility at the start, and that is 0: leave it out"
            )
        return self.first

    def load_state(self, evaluations: list[dict[str, Any]], best: dict[str, Any]) -> None:
        """Restores the evaluations, and the best of them, of a resumed run."""
        if not evaluations:
            raise UserError(
                f"the run has lost its {EVALUATIONS}, which it is to go on with: add --overwrite "
                "to begin anew"
            )
        self.first, self.best = evaluations[0], best

    def on_start(self, training: Training) -> None:
        self.training = training

    def on_step(self, record: StepRecord) -> None:
        self.pending = record
        if record.step % self.options.eval_every == 0 or record.step == record.steps:
            self._evaluate(record)

    def on_trained(self) -> None:
        if self.pending is not None:  # stopped between two evaluations
            self._evaluate(self.pending)
        if self.best:
            self._restore_best()

    def _restore_best(self) -> None:
        training = self.training
        try:
            training.folder.restore_best(training.lm)
        except UserError as error:  # what was trained is not lost with it
            logger.warning(f"WARNING: {error}; the model of the last step is the final one")
            training.final_metadata["best_lost"] = str(error)
        else:
            best = {"measure": self.options.keep_best, **self.best}
            training.final_metadata["best"] = best

    def _evaluate(self, record: StepRecord) -> None:
        training, self.pending = self.training, None
        scores = self._scores(training.lm, record.step, record.epoch)
        training.folder.log_evaluation(scores)
        if self.is_best(scores):
            self.best = scores
            training.folder.keep_best(training.lm, training.tokenizer, scores)
        if self.condition is not None and self.condition.holds(scores):
            self.should_stop = f"{self.options.stop_when} at step {record.step}"
        training.emit("on_evaluation", scores)

    def is_best(self, scores: Mapping[str, Any]) -> bool:
        """Whether ``keep_best`` names a measure, and no earlier evaluation has a better value."""
        measure, share = self.options.keep_best, self.options.min_utility
        if measure is None:
            return False
        if share and scores["model_utility"] < share * self.first["model_utility"]:
            return False
        direction = find_measure(measure).direction
        gain = direction * value_of(scores, measure)
        return not self.best or gain > direction * value_of(self.best, measure)

    def _scores(self, lm: CausalLM, step: int, epoch: float) -> dict[str, Any]:
        return {"step": step, "epoch": epoch, **measures(self.evaluate(lm), self.retrained)}


class CheckpointCallback(Callback):
    """Saves a checkpoint every ``save_every`` steps, and when a signal interrupts the run."""

    def __init__(self, save_every: int, signal: StopSignal) -> None:
        self.save_every, self.signal = save_every, signal

    def on_start(self, training: Training) -> None:
        self.training = training

    def on_step(self, record: StepRecord) -> None:
        training = self.training
        self._tell(training.folder.finished_checkpoint(training.lm))
        if training.stop_reason() is not None:
            return
        number = all_reduce_max(self.signal.number or 0, training.lm.device)
        due = number or (self.save_every and record.step % self.save_every == 0)
        if not due or record.step >= record.steps:
            return
        watch.detail("checkpoint")
        path = training.folder.checkpoint(
            training.lm, training.tokenizer, record.step, training.state, insist=bool(number)
        )
        self._tell(path)
        if number:
            raise Interrupted(
                f"interrupted after step {record.step} of {record.steps}; "
                f"{training.hint} goes on from there",
                number,
            )

    def on_trained(self) -> None:
        self._tell(self.training.folder.finished_checkpoint(self.training.lm, wait=True))

    def _tell(self, path: Path | None) -> None:
        if path is not None:
            self.training.emit("on_checkpoint", path)


class TrackerCallback(Callback):
    """Logs every step and evaluation to an experiment tracker, through accelerate's trackers."""

    def __init__(self, name: Tracker) -> None:
        for library in ("accelerate", name):
            if find_spec(library) is None:
                raise UserError(f"--track {name} needs {library}: pip install {library}")
        self.name = name
        self.tracker: Any = None  # of the main process

    def on_start(self, training: Training) -> None:
        if not training.is_main_process:
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the trackers ask it which process they run in
        folder, kind = training.folder.folder, LOGGER_TYPE_TO_CLASS[self.name]
        where = [str(folder / self.name)] if kind.requires_logging_directory else []
        self.tracker = kind(folder.name, *where)
        self.tracker.start()
        self.tracker.store_init_configuration(_flat(training.folder.metadata["settings"]))

    def on_step(self, record: StepRecord) -> None:
        self._log(record.as_dict(), record.step)

    def on_evaluation(self, scores: Mapping[str, Any]) -> None:
        measured = {key: value for key, value in scores.items() if key not in ("step", "epoch")}
        self._log({"evaluation": measured}, scores["step"])

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if self.tracker is not None:
            values = _flat({k: v for k, v in values.items() if k not in ("step", "steps")})
            try:
                self.tracker.log(values, step=step)
            except OSError as error:  # steps.jsonl has the same
                logger.warning(f"warning: {self.name} cannot log step {step}: {error}")

    def on_end(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level, "terms/NPO"; what is no number becomes a text."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, (int, float)) else str(value)
    return flat
