"""The folder that a run is to have: what is in it, and which process may write to it."""

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from npo_fast import run_files
from npo_fast.boundary import check_regular
from npo_fast.distributed import is_main_process
from npo_fast.errors import UserError, reason_of, short
from npo_fast.locks import lock
from npo_fast.model.manifest import DamagedError, unsealed
from npo_fast.run_files import RUN, STEPS

UNFINISHED = ("running", "interrupted")  # the first is left behind by a process that was killed


def check_path(path: Path, flag: str) -> None:
    """Raises ``UserError`` for a path that no file system takes: too long, or with a NUL."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {short(str(path))}: {reason_of(error)}; name another") from error


def check_run_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds a run that came to its end, or anything that is not a run."""
    check_path(folder, "--output")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the output {folder} is a file; name a folder")
    sizes = {path.name: path.lstat().st_size for path in folder.glob("*")}
    if RUN not in sizes:
        # what a run leaves that was killed before it began
        if sizes.keys() - {f"{RUN}.partial", STEPS} or sizes.get(STEPS):
            raise UserError(
                f"the output {folder} holds files that are not a run; name another folder"
            )
        return
    metadata = {} if overwrite else read_metadata(folder)
    if metadata.get("status") == "moved":
        raise UserError(
            f"the run in {folder} went on in {metadata.get('moved_to', 'another folder')}: name "
            "that --output to go on, or add --overwrite"
        )
    status = metadata.get("status")
    if not overwrite and status not in UNFINISHED:
        ended = f"is finished, with its model in {folder / 'model'}"
        if status != "finished":
            ended = f"has ended ({short(metadata.get('error', status))})"
        raise UserError(
            f"the run in {folder} {ended}: nothing was done. Add --overwrite to delete it and "
            "train anew, or name another --output"
        )


def is_of_run(folder: Path, run: str | None) -> bool:
    """Whether a folder holds the run with this id, such as one that was killed while it moved."""
    try:
        return run is not None and read_metadata(folder).get("id") == run
    except UserError:
        return False


def is_vacant(folder: Path) -> bool:
    """Whether a folder holds no file, or does not exist: a run may move there."""
    if folder.is_dir():
        return not any(path.is_file() for path in folder.rglob("*"))
    return not folder.exists()


def read_metadata(folder: Path, cure: str = "add --overwrite to begin anew") -> dict[str, Any]:
    """``run.json``, or {} where there is none; raises ``UserError`` where it is damaged."""
    if not (folder / RUN).exists():
        return {}
    metadata = run_files.read_metadata(folder, cure)
    if "sha256" not in metadata:
        return metadata
    try:
        return unsealed(metadata, folder / RUN)
    except DamagedError as error:
        raise UserError(
            f"{error}; {cure}, or restore it. Without its sha256 it is taken as it is"
        ) from error


def found_metadata(folder: Path) -> bytes | None:
    """``run.json`` as it is; None where there is none."""
    file = folder / RUN
    return file.read_bytes() if file.exists() else None


def metadata_of_model(path: Path) -> dict[str, Any]:
    """``run.json`` of the run that made a model: its folder, or a model in it; else {}."""
    whole = path.resolve()
    for folder in (whole, *whole.parents[:2]):
        inside = whole.relative_to(folder).parts
        if (folder / RUN).is_file() and (not inside or inside[0] in ("model", "checkpoints")):
            return read_metadata(folder, "move the model out of that folder")
    return {}


def check_unused(folder: Path) -> None:
    """Raises ``UserError`` where another process writes to the run in the folder."""
    if is_main_process() and (folder / STEPS).exists():
        locked_records(folder).close()


def claimed(folder: Path, found: bytes | None) -> TextIO:
    """``_locked``, where ``run.json`` is still as it was ``found``."""
    steps = locked_records(folder)
    if found_metadata(folder) == found:
        return steps
    steps.close()
    raise UserError(
        f"another process had a run in {folder} meanwhile; see how that ended, or name another "
        "--output"
    )


def locked_records(folder: Path) -> TextIO:
    """``steps.jsonl``, to append to; the lock ends with the process, however that ends."""
    if (folder / STEPS).is_symlink() or (folder / STEPS).exists():
        check_regular(folder / STEPS)
    file = (folder / STEPS).open("a", encoding="utf-8")
    try:
        lock(file, wait=False)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"another process writes to the run in {folder}; stop it or name another --output"
        ) from error
    return file


def is_open_file(file: TextIO, path: Path) -> bool:
    """Whether the path still leads to the file that is open."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (OSError, ValueError):  # there is none, or it is closed
        return False


def is_taken(folder: Path, run: str) -> bool:
    """Whether the folder is no longer that of the run with this id."""
    if folder.exists() and not folder.is_dir():
        return True
    try:
        other = json.loads(found_metadata(folder) or b"null")
        check_unused(folder)
    except UserError:
        return True
    except ValueError:  # a damaged run.json, which comes anew
        other = None
    return isinstance(other, dict) and other.get("id") != run


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """The complete checkpoints after steps, in their order."""
    paths = (folder / "checkpoints").glob("step-*")
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in paths)
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def remove_older(checkpoint: Path) -> None:
    """Deletes the checkpoints that ``checkpoint`` replaces; the main process does."""
    if not is_main_process():
        return
    for old in {*checkpoint.parent.glob("step-*")} - {checkpoint}:
        with suppress(OSError):
            # out of sight first: what is half deleted must not look like a checkpoint
            shutil.rmtree(old.rename(old.with_name(old.name + ".old")))
