"""Mutations of sound input: bytes, text, JSON values, files. Each is drawn by a ``Random``."""

import codecs
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

RAW = {  # JSON that ``json.dumps`` cannot write, by the text that stands for it
    "@digits": "9" * 5000,
    "@deep": "[" * 1000 + "]" * 1000,
    "@deeper": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "@huge": "1e400",
    "@nan": "NaN",
    "@infinity": "-Infinity",
    "@twice": '{"a": 1, "a": 2}',
    "@surrogate": '"\\ud800"',
    "@literal": "nul",
}
VALUES: list[Any] = [
    *RAW, None, True, False, 0, -1, 1, 2.5, 1e300, 10**30, "", " ", "x", "3", "\0", "\u2028",
    "a\nb",
    "\x1b[31m", "../../etc/passwd", "x" * 100_000, [], {}, [[]], [None], [1, "a"], {"a": 1},
    {"": {}}, [{}], [[[[1]]]], {"role": []}, "2024-13-45", "{{ 1 / 0 }}",
]  # fmt: skip
TEXTS = [
    "\0", "\ufeff", "\u2028", "\r", "\r\n", "\n", '"', "'", "{", "}", "[", "]", ",", ":", "\\",
    "\t", "{{", "{%", "#", "&a ", "*a", "!!python/object:os.system ", "- ", "null", "\\ud800",
    "9" * 5000, "[" * 1000, "\x1b[2J", "é", "٣", "\U0001f600", ".inf", ".nan", "1e999", "---\n",
]  # fmt: skip
BYTES = [b"\0", b"\xff", b"\xc3", b"\xff\xfe", b"\xed\xa0\x80", b"\x1f\x8b", b"PAR1", b"\x80" * 64]


def mutate_folder(rng: Random, folder: Path) -> str:
    """Changes one file of a folder in place, and says how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return "nothing left"
    path = rng.choice(files)
    name = path.relative_to(folder).as_posix()
    if rng.random() < 0.06:
        return f"{name}: {_replace_file(rng, path)}"
    content = path.read_bytes()
    text = _as_text(content)
    kinds = [mutate_bytes]
    if text is not None:
        kinds += [mutate_text] + [mutate_json] * 6 * _is_json(text)
    changed, how = rng.choice(kinds)(rng, content)
    path.write_bytes(changed)
    return f"{name}: {how}"


def mutate_bytes(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Bits, and pieces of bytes."""
    at, size = rng.randrange(len(content) + 1), rng.choice((1, 2, 8, 64, 4096))
    how = rng.choice(("flip", "flip", "cut", "remove", "repeat", "insert", "empty", "zeros"))
    if how == "flip" and content:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 4, 32))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed), "bits flipped"
    if how == "cut":
        return content[:at], f"cut to {at} bytes"
    if how == "remove":
        return content[:at] + content[at + size :], f"{size} bytes removed at {at}"
    if how == "repeat":
        return content[: at + size] + content[at:], f"{size} bytes repeated at {at}"
    if how == "zeros":
        return content[:at] + bytes(size) + content[at + size :], f"{size} bytes zeroed at {at}"
    if how == "insert":
        piece = rng.choice(BYTES)
        return content[:at] + piece + content[at:], f"{piece[:8]!r} inserted at {at}"
    return b"", "emptied"


def mutate_text(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Characters, lines, encodings."""
    text = content.decode()
    how = rng.choice(("insert", "insert", "lines", "line", "line ends", "encoding", "bom"))
    if how == "insert":
        at, piece = rng.randrange(len(text) + 1), rng.choice(TEXTS)
        return (text[:at] + piece + text[at:]).encode(), f"{piece[:12]!r} inserted at {at}"
    if how == "line ends":
        ends = rng.choice(("\r", "\r\n", "\u2028", ""))
        return text.replace("\n", ends).encode(), f"line ends became {ends!r}"
    if how == "encoding":
        name = rng.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-7"))
        return text.encode(name, "replace"), f"encoded as {name}"
    if how == "bom":
        return codecs.BOM_UTF8 + content, "a byte-order mark"
    lines = text.split("\n")
    i = rng.randrange(len(lines))
    if how == "line":
        value = rng.choice(VALUES)
        lines[i] = dumps(value)
        return "\n".join(lines).encode(), f"line {i + 1} became {value!r:.40}"
    lines.insert(rng.randrange(len(lines) + 1), lines[i] if rng.random() < 0.5 else lines.pop(i))
    return "\n".join(lines).encode(), f"line {i + 1} moved or doubled"


def mutate_json(rng: Random, content: bytes) -> tuple[bytes, str]:
    """A value of JSON, or of a line of it, at a random path."""
    text = content.decode()
    lines = text.split("\n")
    whole = _parsed(text)
    i = -1 if whole is not None else rng.choice([k for k, x in enumerate(lines) if _is_json(x)])
    value = whole if i < 0 else _parsed(lines[i])
    path, how = [], "replaced"
    holder: Any = {"": value}
    key: Any = ""
    while holder[key] and isinstance(holder[key], (dict, list)) and rng.random() < 0.85:
        holder = holder[key]
        key = rng.choice([*holder]) if isinstance(holder, dict) else rng.randrange(len(holder))
        path.append(key)
    if path and rng.random() < 0.2:
        how = "removed"
        del holder[key]
    elif path and isinstance(holder, dict) and rng.random() < 0.1:
        how = "renamed"
        holder[rng.choice(("x", "", "\0", "0", "tools", "text", "role"))] = holder.pop(key)
    else:
        new = rng.choice(VALUES)
        if isinstance(holder[key], (int, float)) and rng.random() < 0.3:
            new = holder[key] * rng.choice((-1, 0, 2, 10**6, 1e-9)) + rng.choice((0, 1, 0.5))
        how = f"became {new!r:.40}"
        if path or i >= 0 or rng.random() < 0.5:
            holder[key] = new
    result = holder[""] if not path else value
    dumped = dumps(result)
    if i >= 0:
        lines[i] = dumped
        dumped = "\n".join(lines)
    where = ".".join(map(str, path)) or "all of it"
    return dumped.encode("utf-8", "surrogatepass"), f"line {i + 1}: {where:.80} {how}"


def dumps(value: Any) -> str:
    text = json.dumps(value)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text


def _replace_file(rng: Random, path: Path) -> str:
    how = rng.choice(("removed", "folder", "pipe", "loop", "device", "empty"))
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "empty":
        path.touch()
    return how


def copy(source: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)


def _as_text(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_json(text: str) -> bool:
    return any(isinstance(_parsed(part), (dict, list)) for part in (text, *text.split("\n")[:1]))
