"""Folders that are written beside and renamed: a failed save leaves the earlier one as it was."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from npo_fast.errors import UserError


def save_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a new folder with ``write`` and puts it in the place of ``folder`` when complete."""
    if not folder.parent.exists():
        folder.parent.mkdir(parents=True)
        sync(folder.parent.parent)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        _sync(partial)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            kept = (
                "what was there before is untouched" if folder.exists() else "nothing was written"
            )
            raise UserError(f"cannot save {folder}: {error}; {kept}") from error
        raise
    old = old_of(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """The earlier content of a folder whose replacement was cut off between two renames."""
    if not folder.exists() and old_of(folder).exists():
        old_of(folder).rename(folder)


def old_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    """On disk before the rename: a power cut leaves no complete name with half a file."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
