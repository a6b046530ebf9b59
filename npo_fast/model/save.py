"""Folders that are written under another name and renamed, so that no save leaves half of one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from npo_fast.errors import UserError


def save_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a new folder with ``write`` and puts it in the place of ``folder`` when complete.

    Where it cannot be written (``UserError``), what was in ``folder`` before is untouched.
    """
    if not folder.parent.exists():
        folder.parent.mkdir(parents=True)
        sync(folder.parent.parent)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        for path in (*partial.rglob("*"), partial):  # else a power cut could leave half of it
            sync(path)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        kept = "what was there before is untouched" if folder.exists() else "nothing was written"
        raise UserError(f"cannot save {folder}: {error}; {kept}") from error
    old = old_of(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


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
