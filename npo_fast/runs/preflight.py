"""What can go wrong hours later, tried before a weight is loaded: device, places, room, saving."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory, TemporaryFile, gettempdir
from typing import Any

from transformers import modeling_utils

from npo_fast.data import Sources
from npo_fast.errors import UserError, first_line
from npo_fast.losses import KL
from npo_fast.methods import Term
from npo_fast.model.adapters import (
    ADAPTER_CONFIG,
    adapter_base,
    no_progress_bars,
    write_weights,
)
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.reference_log_probs import LOG_PROBS, states_name
from npo_fast.model.save import cannot_write, save_tokenizer
from npo_fast.planner.disk import SavedBytes
from npo_fast.run_files import RUN
from npo_fast.runs.folder import CONTENT
from npo_fast.runs.saving import existing, in_words
from npo_fast.trainer.step import layer_of

RECORDS_BYTES = 1 << 20  # run.json, the model card
STEP_BYTES = 1 << 10  # a line of steps.jsonl
PROBE_BYTES = 4096


@dataclass(frozen=True)
class Need:
    """Bytes that will lie in a folder at a time."""

    folder: Path
    size: int
    what: str  # in words, such as "the model"
    cure: str
    present: int = 0  # of these bytes, already there or replaced


def check_writable(folder: Path, flag: str) -> None:
    """Writes into ``folder``, or the nearest one above it that exists; nothing stays behind.

    Raises:
        UserError: no permission, a file system that is read-only or full, or a file in the way.
    """
    place = existing(folder)
    try:
        if not place.is_dir():
            raise NotADirectoryError("it is a file")
        with TemporaryFile(dir=place) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise UserError(
            f"{flag} {folder} cannot be written: {place}: {error.strerror or error}; name another "
            f"{flag}"
        ) from error


def check_spared(output: Path, overwrite: bool, reads: Mapping[str, str]) -> None:
    """Checks that a run into ``output`` deletes nothing that it reads.

    Args:
        reads: models, files, folders and splits by flag; "model" is what it begins with.

    Raises:
        UserError: the folder holds the model, the base of its adapter, or with ``overwrite`` any
            of the others among what is deleted.
    """
    folder = output.resolve()
    deleted = {folder / name for name in CONTENT} if overwrite else set()
    for flag, name in reads.items():
        for i, path in enumerate(_paths_of(name)):
            lost = {folder} if flag == "model" else deleted
            if path == folder or lost & {path, *path.parents}:
                what = f"--{flag} itself" if i == 0 else f"base of --{flag}, {path}"
                raise UserError(f"--output {output} holds the {what}: name another folder")


def _paths_of(name: str) -> Iterator[Path]:
    """What a name stands for on this machine, and the bases of a model that is an adapter."""
    path = next((p for p in (Path(name), Path(name.partition("[")[0])) if p.exists()), None)
    if not name or path is None:
        return
    yield path.resolve()
    for folder in (path, path / "model"):
        if (folder / ADAPTER_CONFIG).is_file():
            yield from _paths_of(adapter_base(folder))


def check_no_model(folder: Path) -> None:
    """Raises ``UserError`` where logs would lie among the files of a run or a model."""
    model = (("config.json", "a model"), (ADAPTER_CONFIG, "an adapter"))
    places: dict[Path, tuple[tuple[str, str], ...]] = {folder: ((RUN, "a run"), *model)}
    if (folder.parent.parent / RUN).exists():  # a run's model has a list of all files in it
        places[folder.parent] = model
    for place, marks in places.items():
        for mark, what in marks:
            if (place / mark).exists():
                outside = place.parent if (place.parent / RUN).exists() else place
                raise UserError(
                    f"--output {folder} is in {what}, of which logs would be a part: name a folder "
                    f"of their own, such as {outside / 'eval'}"
                )


def check_room(needs: Iterable[Need]) -> list[str]:
    """Compares what will be written with what is free; a sentence for each file system.

    Quotas cannot be seen. What is in a run's folder already, and will be replaced or kept, counts.

    Raises:
        UserError: too little room; it names the folder, both sizes and the cure.
    """
    by_device: dict[int, list[Need]] = {}
    for need in needs:
        if need.size:
            by_device.setdefault(existing(need.folder).stat().st_dev, []).append(need)
    sentences = []
    for group in by_device.values():
        place = existing(group[0].folder)
        usage = disk_usage(place)
        size = sum(need.size for need in group)
        free = usage.free + sum(need.present for need in group)
        what = " and ".join(f"{need.what} in {need.folder}" for need in group)
        if usage.total and free < size:  # some network file systems tell no sizes
            cures = "; ".join(need.cure for need in group)
            raise UserError(
                f"too little room: {what}: {in_words(size)} at most, and {place} has "
                f"{in_words(free)} free. Make room, {cures}"
            )
        sentences.append(f"room: {what}: {in_words(size)} at most, {in_words(free)} free")
    return sentences


def check_file_size(size: int) -> None:
    """Raises ``UserError`` where the largest file is above the process's limit on file sizes."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and size > limit:
        raise UserError(
            f"the largest file of this run has {in_words(size)}, and this process may write files "
            f"of {in_words(limit)} at most: raise the limit (ulimit -f unlimited)"
        )


def run_need(output: Path, saved: SavedBytes, checkpoints: int, best: bool, records: int) -> Need:
    """What a run writes into its folder.

    Args:
        checkpoints: how many ``--save-every`` makes.
        best: whether ``--keep-best`` keeps one more model.
        records: bytes of records and references.
    """
    size = saved.peak(checkpoints, best) + records + RECORDS_BYTES
    what = ["the model"]
    if checkpoints:
        what += [f"{min(checkpoints, 2)} checkpoint{'s' if checkpoints > 1 else ''}"]
    what += ["the best model"] if best else []
    cures = ["name another --output", "train an adapter with --lora-rank 16"]
    cures[1:1] = ["leave out --save-every"] if checkpoints else []
    cures[1:1] = ["leave out --keep-best"] if best else []
    return Need(output, size, ", ".join(what), ", ".join(cures), content_bytes(output))


def interruption(need: Need, saved: SavedBytes) -> list[str]:
    """A warning where a run fits, and the checkpoint that Ctrl-C or SIGTERM makes does not."""
    place = existing(need.folder)
    usage = disk_usage(place)
    if not usage.total or usage.free + need.present >= saved.checkpoint + RECORDS_BYTES:
        return []
    return [
        f"warning: a run that is interrupted saves {in_words(saved.checkpoint)} to go on from, and "
        f"{place} has {in_words(usage.free)} free: they would go to --fallback-output, or to the "
        "system's temporary folder"
    ]


def reference_needs(
    sources: Sources, terms: Sequence[Term], lm: CausalLM, cache: Path | None
) -> list[Need]:
    """What ``--reference-cache`` or a temporary folder holds of the model before training."""
    states: dict[str, int] = {}  # source -> rows
    for term in terms:
        if term.loss.reference == "hidden":
            rows = (
                len(e.input_ids) if term.positions == "all" else e.answer_length
                for e in sources[term.source]
            )
            states[term.source] = sum(rows)
    vocabulary, width = lm.head.weight.shape
    has_head = any(isinstance(term.loss, KL) for term in terms)
    size = lm.dtype.itemsize * width * (sum(states.values()) + has_head * vocabulary)
    if cache is None:
        cure = "name a --reference-cache elsewhere, or another folder in TMPDIR"
        return [Need(Path(gettempdir()), size, "the reference's hidden states", cure)]
    compared = [term for term in terms if term.loss.reference == "hidden"]
    if compared and (cache / states_name(layer_of(lm, compared))).exists():
        size = 0
    scored = {name for term in terms if term.loss.reference in ("sequence", "token")
              for name in term.reads}  # fmt: skip
    for name in scored:
        if not (cache / f"{LOG_PROBS}{name}").exists():
            size += sum(4 * e.answer_length + 12 for e in sources[name])
    return [Need(cache, size, "the reference cache", "name another --reference-cache")]


def references_bytes(sources: Sources, terms: Sequence[Term]) -> int:
    """Bytes of ``references.pt``: log-probs of the model before training."""
    kinds = {name: term.loss.reference for term in terms for name in term.reads}
    return sum(
        4 * (e.answer_length if kind == "token" else 1)
        for name, kind in kinds.items()
        if kind in ("sequence", "token")
        for e in sources[name]
    )


def content_bytes(folder: Path) -> int:
    """Bytes of the run that is in a folder: it goes on with them, or replaces them."""
    size = 0
    for name in CONTENT:
        path = folder / name
        for file in path.rglob("*") if path.is_dir() else (path,):
            size += file.lstat().st_size if file.is_file() else 0
    return size


def try_saving(lm: CausalLM, tokenizer: Any) -> int:
    """Saves all of a model but its weights into a temporary folder; returns how many bytes it took.

    ``lm`` may be on the meta device.

    Raises:
        UserError: a configuration, tokenizer or tied weights that the libraries refuse to save.
    """
    with TemporaryDirectory(prefix="npo-fast-") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        try:
            if lm.adapted or not lm.quantized:  # else all of it would be written
                with no_progress_bars():
                    write_weights(lm, folder, {})
            if not lm.adapted:
                _check_ties(lm)
        except Exception as error:  # of transformers or peft, of any kind
            raise _refused("the model", error, "mend its configuration") from error
        try:
            save_tokenizer(tokenizer, folder)
        except Exception as error:
            raise _refused("the tokenizer", error, "mend it, or name another") from error
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _refused(what: str, error: Exception, cure: str) -> UserError:
    if cannot_write(error):
        return UserError(
            f"cannot write into the temporary folder {gettempdir()}: {first_line(error)}; name "
            "another in TMPDIR"
        )
    return UserError(
        f"{what} could not be saved after training: {type(error).__name__}: {first_line(error)}; "
        f"{cure}"
    )


def _check_ties(lm: CausalLM) -> None:
    """What transformers does with weights that share memory when it saves them."""
    check = getattr(modeling_utils, "remove_tied_weights_from_state_dict", None)
    if check is not None and lm.vocabulary_slice is None:
        check(dict(lm.model.state_dict()), lm.model)
