"""What a folder held when it was saved: size and SHA-256 of every file, and of the list itself.

The list is the last file to be written. It holds facts beside: which run, after which step.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

MANIFEST = "manifest.json"
LARGE_BYTES = 2 << 30  # a few seconds of SHA-256
# files that transformers, peft and tokenizers look for by name: one more could be loaded instead
LOADED = (
    ".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".model", ".txt", ".py", ".tiktoken",
)  # fmt: skip
logger = logging.getLogger(__name__)


class DamagedError(Exception):
    """Raised where a file cannot be read, or is not what was written; the message names it."""


def write_manifest(
    folder: Path,
    name: str = MANIFEST,
    known: Mapping[str, str] = MappingProxyType({}),
    **facts: Any,
) -> None:
    """Writes the list of the files in ``folder``, with the facts, as its last file.

    ``known`` has the SHA-256 of files that other processes wrote.
    """
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != name
    }
    unknown = [file for file in paths if file not in known]
    sums = {**known, **dict(zip(unknown, _sha256_of([paths[f] for f in unknown]), strict=True))}
    files = {
        file: {"bytes": path.stat().st_size, "sha256": sums[file]} for file, path in paths.items()
    }
    text = json.dumps(sealed({**facts, "files": files}), indent=1)
    (folder / name).write_text(text, encoding="utf-8")


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The facts and ``files`` of a folder; ``DamagedError`` where they are not as written."""
    file = folder / name
    if file.exists() and not file.is_file():
        raise DamagedError(f"{file} cannot be read (it is no file)")
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"cannot read {file} (it is missing)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{file} cannot be read ({error})") from error
    return unsealed(content, file)


def check_saved(
    folder: Path,
    run: str | None,
    unread: tuple[str, ...] = (),
    share: slice = slice(None),
) -> dict[str, Any]:
    """The facts of a folder that holds what was saved, by the ``run`` where that is given.

    Args:
        unread, share: as in ``check_files``.

    Raises:
        DamagedError: a file changed since, or all are of another run.
    """
    facts = read_manifest(folder)
    if run is not None and facts.get("run") != run:
        raise DamagedError(f"{folder / MANIFEST} is of another run ({facts.get('run')}, not {run})")
    check_files(folder, facts["files"], unread=unread, share=share)
    return facts


def check_files(
    folder: Path,
    files: Mapping[str, Mapping[str, Any]],
    name: str = MANIFEST,
    unread: tuple[str, ...] = (),
    share: slice = slice(None),
) -> None:
    """Raises ``DamagedError`` for the first file that is not as listed, or that is one too many.

    A file too many is one of a kind that is loaded by its name. A model card is none.

    Args:
        files: of the manifest, whose name is ``name``.
        unread: endings of files of which only the size is compared.
        share: of the other files, those that this process reads; others read the rest.
    """
    for file, listed in files.items():
        path = folder / file
        if not path.is_file():
            raise DamagedError(f"cannot read {path} (it is missing)")
        if (size := path.stat().st_size) != listed["bytes"]:
            raise DamagedError(f"{path} is damaged ({size} bytes, not {listed['bytes']})")
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix in LOADED and relative.as_posix() not in {*files, name} and not is_hidden:
            raise DamagedError(f"{path} is not among the files that were saved")
    hashed = [file for file in files if not file.endswith(unread)][share]
    total = sum(files[file]["bytes"] for file in hashed)
    if total > LARGE_BYTES:
        logger.info(f"checking {total / 2**30:.1f} GiB in {folder}")
    for file, sha256 in zip(hashed, _sha256_of([folder / f for f in hashed]), strict=True):
        if sha256 != files[file]["sha256"]:
            raise DamagedError(f"{folder / file} is damaged (its SHA-256 has changed)")


def records_state(content: bytes | bytearray) -> dict[str, Any]:
    """Size and SHA-256 of the records that a run has written by now."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def checked_records(file: Path, state: Mapping[str, Any], ended: bool = False) -> bytes:
    """The records that the file held at this ``state``, and none after it where the run ``ended``.

    Raises:
        DamagedError: a line was lost, changed or added.
    """
    content = file.read_bytes() if file.is_file() else b""
    records = content if ended else content[: state["bytes"]]
    if records_state(records) != state:
        raise DamagedError(f"{file} is damaged (a line was lost, changed or added)")
    return records


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as JSON keeps it, with the SHA-256 of itself."""
    plain = json.loads(json.dumps(content, default=str))
    return {**plain, "sha256": _sha256_of_json(plain)}


def unsealed(content: Any, file: Path) -> dict[str, Any]:
    """The content without its SHA-256; ``DamagedError`` where that is of something else."""
    if not isinstance(content, dict):
        raise DamagedError(f"{file} is damaged (a JSON object is expected)")
    plain = {name: value for name, value in content.items() if name != "sha256"}
    if content.get("sha256") != _sha256_of_json(plain):
        raise DamagedError(f"{file} is damaged (the SHA-256 that ends it is of another content)")
    return plain


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file; ``DamagedError`` where it is none, or cannot be read."""
    if not path.is_file():  # reading a pipe may never end
        raise DamagedError(f"cannot read {path} (it is no file)")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sha256_of(paths: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor(4) as pool:  # hashing leaves other threads their turn
        return list(pool.map(sha256_of_file, paths))


def _sha256_of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
