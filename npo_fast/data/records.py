"""Question-answer records from a file, a folder or a hub dataset.

Three forms of a record are understood: ``{"question", "answer"}`` (TOFU, with the optional
``paraphrased_answer`` and ``perturbed_answer`` that the truth ratio needs), ``{"prompt",
"completion"}`` and ``{"messages": [{"role", "content"}, ...]}`` whose last message is the answer;
each may have ``alternate``, an answer or several that AltPO puts in the place of the true one.
Files hold one JSON object a line, or one JSON array.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_fast.errors import NoSuchSplitError, UserError

FORMS = '"question"/"answer", "prompt"/"completion" or "messages"'
IN_MEMORY = "(rows)"  # in the place of a name
SUFFIXES = (".json", ".jsonl")
_SLICE = re.compile(r"^(?P<name>.*?)\[(?P<first>-?\d+)?:(?P<last>-?\d+)?\]$")


@dataclass(frozen=True)
class Record:
    """A question with its answer, to learn, keep or forget, and what its evaluation needs."""

    messages: tuple[tuple[str, str], ...]  # (role, content) up to the answer; the last is a user's
    answer: str
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    alternates: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The last message before the answer; a raw text has none."""
        return self.messages[-1][1] if self.messages else ""

    @property
    def is_text(self) -> bool:
        """Whether it is a raw text: no messages, and all of it the answer."""
        return not self.messages


Records = str | Path | Iterable[Record | Mapping[str, Any]]  # by name, or in memory


def load_records(source: Records, data: str | None = None, role: str = "data") -> list[Record]:
    """Records of one split, by name or from rows in memory.

    Args:
        source: a file, or the name of a split of ``data``; either may end in a slice such as
            ``forget05[:160]`` or ``mine.jsonl[-40:]``. Or rows: dicts with the keys of a file's
            records, a ``datasets.Dataset``, or ``Record`` objects.
        data: a folder with ``<name>.json`` or ``.jsonl``, a file, or a hub dataset such as
            ``locuslab/TOFU`` (a configuration of that name, else a split).
        role: what messages call rows in memory.

    Raises:
        NoSuchSplitError: no such file or split (the message lists those there are).
        UserError: no record at all, or one without one of the three forms (the message names
            file and line).
    """
    if not isinstance(source, (str, Path)):
        records = [
            row if isinstance(row, Record) else parse_record(row, f"{role}, record {i + 1}")
            for i, row in enumerate(source)
        ]
        if not records:
            raise UserError(f"{role} holds no record")
        return records
    name, part = _parse_slice(str(source))
    rows, where = _read(name, data)
    if not rows:
        raise UserError(f"{where} is empty: it holds no record; give a file with one record a line")
    records = [parse_record(row, f"{where}, record {i + 1}") for i, row in enumerate(rows)][part]
    if not records:
        raise UserError(f"{str(source)!r} selects no record: {where} holds {len(rows)}")
    return records


def as_rows(source: Records | None, role: str) -> Any:
    """A name or None as it is; rows as a list, so that a generator can be read twice.

    Raises:
        UserError: it is neither; the message names the argument ``role``.
    """
    if source is None or isinstance(source, (str, Path)):
        return source
    usable = isinstance(source, Iterable) and not isinstance(source, Mapping)
    rows = list(source) if usable else [None]
    if rows and not isinstance(rows[0], (Record, Mapping)):  # a data frame gives column names
        raise UserError(
            f"{role} must be a file, a split or rows (dicts, Record objects, a datasets.Dataset), "
            f"got {type(source).__name__}"
        )
    return rows


def describe(source: Records | None) -> Any:
    """A name or None as ``run.json`` has it; rows in memory have no name."""
    if source is None:
        return None
    return str(source) if isinstance(source, (str, Path)) else IN_MEMORY


def parse_record(row: Any, where: str) -> Record:
    """A record from a JSON object in one of the three forms; errors begin with ``where``."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if "messages" in row:
        messages, answer = _split_messages(row["messages"], where)
    else:
        pairs = (("question", "answer"), ("prompt", "completion"))
        keys = next((pair for pair in pairs if row.keys() & {*pair}), None)
        if keys is None:
            raise UserError(f"{where}: found the keys {sorted(row)}, expected {FORMS}")
        prompt, answer = (_text(row, key, where) for key in keys)
        messages = (("user", prompt),)
    paraphrases = _texts(row, "paraphrased_answer", where)
    if len(paraphrases) > 1:
        raise UserError(f'{where}: "paraphrased_answer" must be one text, got {len(paraphrases)}')
    wrong, alternates = (_texts(row, key, where) for key in ("perturbed_answer", "alternate"))
    return Record(messages, answer, next(iter(paraphrases), None), wrong, alternates)


def _split_messages(messages: Any, where: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """The messages up to the answer, and the answer."""
    try:
        turns = tuple((m["role"], m["content"]) for m in messages)
    except (TypeError, KeyError) as error:
        raise UserError(f'{where}: "messages" must be a list of {{"role", "content"}}') from error
    roles = [role for role, _ in turns]
    if roles[-2:] != ["user", "assistant"]:
        raise UserError(
            f"{where}: \"messages\" must end with a user's and then an assistant's message, "
            f"got roles {roles}"
        )
    for _, content in turns:
        if not isinstance(content, str):
            raise UserError(f'{where}: "content" must be a text, got {content!r}')
    return turns[:-1], _text({"content": turns[-1][1]}, "content", where)


def _texts(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The texts of a key that may be absent, one text or a list of them."""
    value = row.get(key) or []  # exports write "" or false where there is none
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f'{where}: "{key}" must be a text or a list of texts, got {value!r}')
    return tuple(text for text in texts if text.strip())


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        found = sorted(row)
        raise UserError(f'{where}: the key "{key}" is missing, found {found}; expected {FORMS}')
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f'{where}: "{key}" must be a text that is not empty, got {value!r}')
    return value


def _parse_slice(name: str) -> tuple[str, slice]:
    match = _SLICE.match(name)
    if match is None:
        return name, slice(None)
    first, last = (int(bound) if bound else None for bound in match.group("first", "last"))
    return match["name"], slice(first, last)


def _read(name: str, data: str | None) -> tuple[list[Any], str]:
    """Rows, and their source for messages; a split of ``data`` wins over a file of that name."""
    file = Path(name)
    if data is None:
        if file.is_file():
            return _read_file(file), str(file)
        cure = "" if file.suffix else "; to use it as a split, say which data with --data"
        raise NoSuchSplitError(f"no file {name!r}{cure}")
    folder = Path(data)
    if not folder.exists() and (folder.suffix in SUFFIXES or data.startswith((".", "/", "~"))):
        raise UserError(f"no file or folder {data!r}")
    if folder.is_file() and name in ("", "train", str(folder)):
        return _read_file(folder), str(folder)
    for path in (*(folder / f"{name}{suffix}" for suffix in ("", *SUFFIXES)), file):
        if path.is_file():
            return _read_file(path), str(path)
    if folder.is_file():
        raise NoSuchSplitError(
            f"{data} is a file and has no split {name!r}; name the files themselves, "
            "or a folder that holds them"
        )
    if folder.is_dir():
        splits = sorted(path.stem for path in folder.iterdir() if path.suffix in SUFFIXES)
        raise NoSuchSplitError(
            f"unknown split {name!r}: {folder} has {', '.join(splits) or 'no .json or .jsonl file'}"
        )
    return _read_hub(data, name), f"{data}/{name}"


def _read_file(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    is_array = text.lstrip().startswith("[")
    rows: list[Any] = []
    # at "\n" alone: JSON may hold other line ends
    for number, part in enumerate([text] if is_array else text.split("\n")):
        try:
            if part.strip():
                rows.append(json.loads(part))
        except json.JSONDecodeError as error:
            line = number + error.lineno
            raise UserError(f"{path}, line {line}: not valid JSON: {error.msg}") from error
    return rows[0] if is_array else rows


def _read_hub(data: str, name: str) -> list[Any]:
    import datasets  # takes a second to import, and files do not need it

    try:
        configurations = datasets.get_dataset_config_names(data)
        if name in configurations:
            return datasets.load_dataset(data, name, split="train").to_list()
        return datasets.load_dataset(data, split=name).to_list()
    except ValueError as error:
        raise NoSuchSplitError(
            f"dataset {data!r} has no configuration or split {name!r}: {error}"
        ) from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot load dataset {data!r}: {error}\n"
            "If it is meant as a folder, check the path; without a network, pass a folder"
        ) from error
