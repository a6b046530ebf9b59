"""Files from outside: read as bytes, text, JSON; each a result or a ``UserError`` of one line."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from npo_fast.errors import UserError, reading, short
from npo_fast.validation import check_shape


def check_regular(path: Path) -> None:
    """Raises ``UserError`` for what is no file: reading a pipe or a device may never end."""
    with reading(repr(str(path))):
        mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"cannot read {str(path)!r}: it is {kind}; name a file")


def check_folder(folder: Path) -> None:
    """Raises ``UserError`` where something in a folder, or below it, is a pipe or a device."""
    with reading(folder):
        for path in folder.rglob("*"):
            if path.exists() and not (path.is_file() or path.is_dir()):
                check_regular(path)


def read_bytes(path: Path) -> bytes:
    """The content of a file; ``UserError`` where it cannot be read."""
    check_regular(path)
    with reading(repr(str(path))):
        return path.read_bytes()


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark; ``UserError`` for others."""
    with reading(path, "save it as UTF-8 text"):
        return read_bytes(path).decode("utf-8-sig")


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        UserError: not valid JSON, nested too deeply, a number of thousands of digits, or an object
            with a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error}") from error
    except UserError:
        raise
    except RecursionError as error:
        raise UserError("too many brackets within each other") from error
    except ValueError as error:
        raise UserError("a number of thousands of digits") from error


def read_json(path: Path, shape: Any = Any, cure: str = "") -> Any:
    """What a JSON file holds.

    Args:
        shape: the type that it has, as for ``check_shape``.
        cure: what the user can do about a damaged one.

    Raises:
        UserError: it cannot be read, or holds something else; the message names file and cure.
    """
    text = read_text(path)
    try:
        value = parse_json(text)
        check_shape(value, shape)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}{f'; {cure}' if cure else ''}") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UserError(f"an object has a key twice, {short(twice)}")
    return found
