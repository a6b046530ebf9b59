"""Folders that are written under another name and renamed, so that no save leaves half of one."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from npo_fast.errors import CannotSaveError

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def save_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a new folder with ``write`` and puts it in the place of ``folder`` when complete.

    Where it cannot be written (``CannotSaveError``), what was in ``folder`` before is untouched.
    """
    partial = partial_of(folder)
    try:
        begin_folder(folder)
        write(partial)
        complete_folder(folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            recover(folder)
        if not cannot_write(error):
            raise
        raise cannot_save(folder, error) from error


def cannot_save(folder: Path, error: BaseException) -> CannotSaveError:
    """Says why a folder was not written."""
    kept = "what was there before is untouched" if folder.exists() else "nothing was written"
    return CannotSaveError(f"cannot save {folder}: {error}; {kept}")


def partial_of(folder: Path) -> Path:
    """Where a folder lies until it is complete."""
    return folder.with_name(folder.name + ".partial")


def begin_folder(folder: Path) -> None:
    """Makes ``partial_of(folder)`` empty."""
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    if not folder.parent.exists():
        folder.parent.mkdir(parents=True)
        sync(folder.parent.parent)
    partial.mkdir()


def complete_folder(folder: Path) -> None:
    """Puts ``partial_of(folder)`` in the place of ``folder``."""
    partial, old = partial_of(folder), old_of(folder)
    for path in (*partial.rglob("*"), partial):  # else a power cut could leave half of it
        sync(path)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def cannot_write(error: BaseException) -> bool:
    """Whether an error is that of a file which cannot be written, by Python or by the libraries.

    tokenizers raises a bare ``Exception`` with the words of the system.
    """
    bare = type(error) is Exception and "(os error " in str(error)
    return bare or isinstance(error, (OSError, SafetensorError))


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


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves a tokenizer: the files it came from, byte for byte, unless it was changed since.

    transformers would write them anew, with settings that the given ones do not have.
    """
    tokenizer.save_pretrained(folder)
    name = getattr(tokenizer, "name_or_path", "")  # none where it was made in memory
    if not name:
        return
    files = {*TOKENIZER_FILES, *getattr(tokenizer, "vocab_files_names", {}).values()}
    given = {file: path for file in files if (path := _cached(name, file)) is not None}
    if "tokenizer_config.json" not in given:
        return
    with TemporaryDirectory() as temporary:
        try:
            AutoTokenizer.from_pretrained(
                name, local_files_only=True, trust_remote_code=False
            ).save_pretrained(temporary)
        except (OSError, ValueError, KeyError):  # what cannot be read again was not the source
            return
        fresh = [path for path in Path(temporary).rglob("*") if path.is_file()]
        written = [folder / path.relative_to(temporary) for path in fresh]
        for ours, unchanged in zip(written, fresh, strict=True):
            if not ours.exists() or _settings(ours) != _settings(unchanged):
                return
    for ours in written:
        ours.unlink()
    for file, source in given.items():
        shutil.copyfile(source, folder / file)


def save_generation_config(model: Any, folder: Path) -> None:
    """Saves how a model generates: the file it came from, byte for byte, unless it was changed.

    transformers refuses to write what it finds at odds, such as a temperature without sampling.
    """
    config, given = model.generation_config, None
    if model.name_or_path:
        given = _cached(model.name_or_path, GENERATION)
    if given is not None:
        with suppress(OSError, ValueError):  # what cannot be read again was not the source
            came = GenerationConfig.from_pretrained(Path(given).parent).to_dict()
            if came == {**config.to_dict(), "transformers_version": came["transformers_version"]}:
                shutil.copyfile(given, folder / GENERATION)
                return
    config = copy(config)
    config.compile_config = None  # of this machine, and not always JSON
    (folder / GENERATION).write_text(config.to_json_string(), encoding="utf-8")


def _settings(file: Path) -> Any:
    """What a file of a tokenizer says, but for how it was loaded, which transformers notes too."""
    content = file.read_bytes()
    if file.name != "tokenizer_config.json":
        return content
    how = ("is_local", "local_files_only")
    return {key: value for key, value in json.loads(content).items() if key not in how}


def _cached(name: str, file: str) -> str | None:
    """A file of a folder or of a hub repository that was downloaded; None where there is none."""
    try:
        return cached_file(
            name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError):  # no such repository
        return None


def recover(folder: Path) -> None:
    """Restores the content of a folder whose replacement was cut off between two renames."""
    if not folder.exists() and old_of(folder).exists():
        old_of(folder).rename(folder)


def old_of(folder: Path) -> Path:
    """Where the earlier content is while a folder is replaced."""
    return folder.with_name(folder.name + ".old")


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk; on Windows only what was closed is."""
    if os.name == "nt":  # a folder cannot be opened there, nor a file that is only read be synced
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
