"""A run in a folder that did not end: whether it is the same run, and where it can resume."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npo_fast.errors import UserError
from npo_fast.runs.folder import (
    REFERENCES,
    STEPS,
    UNFINISHED,
    check_unused,
    checkpoints_of,
    lines_of,
    read_metadata,
)
from npo_fast.runs.options import RunOptions
from npo_fast.trainer.state import DamagedError, TrainState, load_tensors
from npo_fast.versions import versions

logger = logging.getLogger(__name__)

# where hidden states are kept, and what only memory depends on
_TOLD_BY_TOKENS = ("chat_template_sha256",)
_IGNORED = ("reference_cache", "micro_batch_tokens", "gradient_checkpointing")


@dataclass(frozen=True)
class ResumableRun:
    """A run that was killed or interrupted, and what it takes to go on."""

    folder: Path
    metadata: dict[str, Any]  # its run.json
    weights: Path | None  # of its last complete checkpoint; None: it has to start anew
    state: TrainState = field(default_factory=TrainState)
    references: dict[str, Any] | None = None  # log-probs of the model as it was, if not lost
    trained: bool = False  # the weights are the final ones
    damaged: tuple[str, ...] = ()  # checkpoints that cannot be used, with the reason

    def check(self, metadata: Mapping[str, Any]) -> None:
        """Raises ``UserError`` unless it is the run that ``metadata`` describes."""
        here = json.loads(json.dumps(metadata, default=str))
        if differences := list(_differences(self.metadata, here)):
            raise UserError(
                f"the output {self.folder} holds an unfinished run that differs: "
                f"{'; '.join(differences)}. Start it as it was to go on, add --overwrite to begin "
                "anew, or name another --output"
            )


def find_resumable(
    options: RunOptions, metadata: Mapping[str, Any], in_memory: bool
) -> ResumableRun | None:
    """The run in the output folder to go on with, if there is one.

    Raises:
        UserError: it is not the run that ``metadata`` describes, another process is at work on it,
            none of its checkpoints can be read, or it may have changed the model ``in_memory``.
    """
    folder = options.output
    resumable = None if options.overwrite else _resumable_run(folder)
    if resumable is None:
        return None
    resumable.check(metadata)
    for damage in resumable.damaged:
        logger.info(f"ignored, for it is damaged: {damage}")
    if resumable.weights is None and in_memory:
        raise UserError(
            f"the run in {folder} ended without a checkpoint, and may have changed the model in "
            "memory: load the model again, and add --overwrite to begin anew"
        )
    if resumable.weights is None:
        logger.info(f"the run in {folder} ended without a checkpoint: it starts again at step 0")
        return None
    if resumable.trained:
        logger.info(f"the run in {folder} was trained already: going on after the last step")
    else:
        logger.info(f"going on with the run in {folder} after step {resumable.state.step}")
    before, now = resumable.metadata.get("versions", {}), versions()
    if changed := [name for name in now if before.get(name) != now[name]]:
        logger.info(f"not the same as when it began, so digits may differ: {', '.join(changed)}")
    return resumable


def _resumable_run(folder: Path) -> ResumableRun | None:
    metadata = read_metadata(folder)
    if metadata.get("status") not in UNFINISHED:
        return None
    check_unused(folder)
    if "final" in metadata and (folder / "model").is_dir():
        state = TrainState(metadata["final"]["step"])
        return ResumableRun(folder, metadata, folder / "model", state, trained=True)
    damaged: list[str] = []
    references = None
    for checkpoint in reversed(checkpoints_of(folder).values()):
        try:
            state = TrainState.load(checkpoint)
            if all(line["step"] != state.step for line, _ in lines_of(folder / STEPS)):
                raise DamagedError(f"steps.jsonl has no line for step {state.step}")
        except DamagedError as error:
            damaged.append(f"{checkpoint}: {error}")
            continue
        try:
            references = load_tensors(folder / REFERENCES)
        except DamagedError as error:
            if (folder / REFERENCES).exists():
                damaged.append(f"{folder / REFERENCES}: {error}")
        return ResumableRun(folder, metadata, checkpoint, state, references, damaged=tuple(damaged))
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} can be read: {'; '.join(damaged)}. Mend or remove them, or "
            "add --overwrite to begin anew"
        )
    return ResumableRun(folder, metadata, None)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """A phrase for each setting, and each other fact of ``here``, that is not the same there."""
    old, new = _settings(there), _settings(here)
    facts = [(name, old.get(name), new.get(name)) for name in {**old, **new}]
    facts += [(name, there.get(name), here[name]) for name in here if name != "settings"]
    for name, was, now in facts:
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
            for key in changed:
                if name != "data":
                    if key not in _TOLD_BY_TOKENS:
                        yield f"the {name}'s {key} differs"
                elif _records(was.get(key)) == _records(now.get(key)):
                    yield f"the {key} records are the same, and their template or tokenizer is not"
                else:
                    yield f"data {key} has changed"
        elif was != now and not _same_place(was, now):
            yield f"{name} is {was!r} there and {now!r} here"


def _same_place(was: Any, now: Any) -> bool:
    """Whether a path may be another from another directory: an absolute one ends in the other."""
    if not (isinstance(was, str) and isinstance(now, str)):
        return False
    absolute, relative = sorted((Path(was), Path(now)), key=lambda path: not path.is_absolute())
    parts = tuple(part for part in relative.parts if part != "..")
    ends = absolute.parts[-len(parts) :] == parts
    return bool(parts) and absolute.is_absolute() and not relative.is_absolute() and ends


def _records(data: Mapping[str, Any] | None) -> Any:
    """What stands for the text of the records; it equals nothing else where that is not known."""
    return (data or {}).get("records_sha256", object())


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, without those of the run folder."""
    return {
        name: value
        for group, values in metadata.get("settings", {}).items()
        for name, value in values.items()
        if group != "run" and name not in _IGNORED
    }
