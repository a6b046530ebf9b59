"""A run in a folder that did not end: whether it is the same run, and where it can resume."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from npo_fast.distributed import gather_objects, rank, world_size
from npo_fast.errors import UserError, reading
from npo_fast.model.manifest import (
    MANIFEST,
    DamagedError,
    check_saved,
    checked_records,
    sha256_of_file,
)
from npo_fast.model.save import old_of, save_file
from npo_fast.run_files import SHORTAGE
from npo_fast.runs.folder import REFERENCES
from npo_fast.runs.options import RunOptions
from npo_fast.runs.output import UNFINISHED, check_unused, checkpoints_of, read_metadata
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.state import TrainState, load_tensors
from npo_fast.versions import versions

logger = logging.getLogger(__name__)
T = TypeVar("T")

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
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the manifest beside the weights
    references: dict[str, Any] | None = None  # log-probs of the model as it was, if not lost
    damaged: tuple[str, ...] = ()  # files that cannot be used, with the reason

    @property
    def trained(self) -> bool:
        """Whether the weights are the final ones."""
        return self.weights == self.folder / "model"

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
    check_unused(folder)
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


def note_shortage(folder: Path, settings: TrainSettings, tokens: int) -> None:
    """Leaves in a run folder how many tokens at a time may fit, where ``settings`` have too many.

    Written by the process that ran out of memory, whichever it is.
    """
    asked, earlier = settings.micro_batch_tokens, _shortage(folder)
    if earlier is not None and earlier[1] == asked:  # these are not what the user had asked for
        asked = earlier[0]
    note = json.dumps({"asked": asked, "instead": tokens})
    with suppress(OSError):  # a full disk: the error has the number too
        save_file(folder / SHORTAGE, lambda file: file.write_text(note))


def within_memory(options: RunOptions, settings: TrainSettings) -> TrainSettings:
    """Settings of a run that may have had too many tokens at a time, with so many as may fit."""
    noted = None if options.overwrite else _shortage(options.output)
    if noted is None or noted[0] != settings.micro_batch_tokens:  # the user chose another number
        return settings
    asked, tokens = noted
    logger.info(f"{asked} tokens at a time did not fit the memory: {tokens} from here")
    return replace(settings, micro_batch_tokens=tokens)


def _shortage(folder: Path) -> tuple[int, int] | None:
    """The tokens at a time that were asked for, and those instead, where they did not fit."""
    if not (file := folder / SHORTAGE).exists():
        return None
    with reading(file, "remove it"):
        note = json.loads(file.read_text())
        return int(note["asked"]), int(note["instead"])


def _resumable_run(folder: Path) -> ResumableRun | None:
    metadata = read_metadata(folder)
    seen = metadata.get("id"), metadata.get("status"), [*checkpoints_of(folder)]
    if any(there != seen for there in gather_objects(seen)):
        raise UserError(f"--output {folder} must be a folder that all processes share")
    if metadata.get("status") not in UNFINISHED:
        return None
    damaged: list[str] = []
    final = metadata.get("final", {}).get("step")
    if final is not None and (folder / "model").is_dir():
        try:
            facts = _agreed(_checked, folder, folder / "model", metadata, final)
            return ResumableRun(folder, metadata, folder / "model", TrainState(final), facts)
        except DamagedError as error:
            damaged.append(str(error))
    for step, checkpoint in reversed(checkpoints_of(folder).items()):
        try:
            facts, state = _agreed(_checkpoint, folder, checkpoint, metadata, step)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        references, lost = _references(folder, metadata)
        damaged += lost
        return ResumableRun(folder, metadata, checkpoint, state, facts, references, tuple(damaged))
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} can be read: {'; '.join(damaged)}. Mend or remove them, or "
            "add --overwrite to begin anew"
        )
    return ResumableRun(folder, metadata, None)


def _agreed(check: Callable[..., T], *arguments: Any) -> T:
    """What ``check`` returns; where it finds damage on one process, all raise ``DamagedError``."""
    try:
        found, damage = check(*arguments), ""
    except DamagedError as error:
        found, damage = None, str(error)
    if told := next(filter(None, gather_objects(damage)), ""):
        raise DamagedError(told)
    assert found is not None
    return found


def _checkpoint(
    folder: Path, saved: Path, metadata: Mapping[str, Any], step: int
) -> tuple[dict[str, Any], TrainState]:
    """The facts of a checkpoint, and the state to go on with."""
    facts = _checked(folder, saved, metadata, step)
    _check_best(folder, metadata, facts["best"])
    return facts, TrainState.load(saved)


def _checked(folder: Path, saved: Path, metadata: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The facts of a model that the run saved after ``step``, with the records until then.

    Raises:
        DamagedError: something of it, or of the records, is not what was written.
    """
    facts = check_saved(saved, metadata.get("id", ""), share=slice(rank(), None, world_size()))
    if facts["step"] != step:
        raise DamagedError(f"{saved / MANIFEST} is of step {facts['step']}, not {step}")
    for name, state in facts["records"].items():
        checked_records(folder / name, state)
    return facts


def _check_best(folder: Path, metadata: Mapping[str, Any], step: int | None) -> None:
    """Checks that the best model is there as it was saved at ``step``, or later."""
    best = folder / "checkpoints" / "best"
    if step is None:  # none was saved, or one of a step that is made again
        return
    saved = best if best.exists() or not old_of(best).exists() else old_of(best)
    facts = check_saved(saved, metadata["id"], share=slice(rank(), None, world_size()))
    if facts["step"] < step:
        raise DamagedError(f"{saved / MANIFEST} is of step {facts['step']}, not {step}")


def _references(
    folder: Path, metadata: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, list[str]]:
    """The log-probs of the model as it was, if they are what was written; else why they are not."""
    file = folder / REFERENCES
    if not file.exists():
        return None, []
    if sha256_of_file(file) != metadata.get("references_sha256"):
        return None, [f"{file} is damaged (its SHA-256 has changed)"]
    return load_tensors(file), []


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
