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
_SLICE = re.compile(r"^(?P<name>.*?)\[(?P<first>-?\d*):(?P<last>-?\d*)\]$")


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
        """The last message before the answer."""
        return self.messages[-1][1]


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
        rows = [
            row if isinstance(row, Record) else parse_record(row, f"{role}, record {i + 1}")
            for i, row in enumerate(source)
        ]
        if not rows:
            raise UserError(f"{role} holds no record")
        return rows
    name = str(source)
    base, part = _parse_slice(name)
    read, where = _read(base, data)
    if not read:
        raise UserError(f"{where} is empty: it holds no record; give a file with one record a line")
    records = [parse_record(row, f"{where}, record {i + 1}") for i, row in enumerate(read)][part]
    if not records:
        raise UserError(f"{name!r} selects no record: {where} holds {len(read)}")
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
    """A record from a JSON object in one of the three forms.

    Raises:
        UserError: another form; the message begins with ``where``.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if "messages" in row:
        return _from_messages(row, where)
    for prompt_key, answer_key in (("question", "answer"), ("prompt", "completion")):
        if prompt_key in row or answer_key in row:
            prompt, answer = _text(row, prompt_key, where), _text(row, answer_key, where)
            return Record((("user", prompt),), answer, *_other_answers(row, where))
    raise UserError(f"{where}: found the keys {sorted(row)}, expected {FORMS}")


def _from_messages(row: dict[str, Any], where: str) -> Record:
    messages = row["messages"]
    try:
        turns = tuple((m["role"], m["content"]) for m in messages)
    except (TypeError, KeyError) as error:
        raise UserError(f'{where}: "messages" must be a list of {{"role", "content"}}') from error
    if len(turns) < 2 or turns[-1][0] != "assistant" or turns[-2][0] != "user":
        raise UserError(
            f"{where}: \"messages\" must end with a user's and then an assistant's message, "
            f"got roles {[role for role, _ in turns]}"
        )
    for message in messages:
        if not isinstance(message["content"], str):
            raise UserError(f'{where}: "content" must be a text, got {message["content"]!r}')
    _text({"content": turns[-1][1]}, "content", where)
    return Record(turns[:-1], turns[-1][1], *_other_answers(row, where))


def _other_answers(
    row: dict[str, Any], where: str
) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:  # paraphrased, wrong, alternate
    paraphrases = _texts(row, "paraphrased_answer", where)
    if len(paraphrases) > 1:
        raise UserError(f'{where}: "paraphrased_answer" must be one text, got {len(paraphrases)}')
    wrong, alternates = (_texts(row, key, where) for key in ("perturbed_answer", "alternate"))
    return (paraphrases[0] if paraphrases else None), wrong, alternates


def _texts(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The texts of a key that may be absent, one text or a list of them."""
    value = row.get(key) or []  # exports write "" or false where there is none
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f'{where}: "{key}" must be a text or a list of texts, got {value!r}')
    return tuple(text for text in texts if text.strip())


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise UserError(
            f'{where}: the key "{key}" is missing, found {sorted(row)}; expected {FORMS}'
        )
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f'{where}: "{key}" must be a text that is not empty, got {value!r}')
    return value


def _parse_slice(name: str) -> tuple[str, slice]:
    match = _SLICE.match(name)
    if not match:
        return name, slice(None)
    first, last = match["first"], match["last"]
    return match["name"], slice(int(first) if first else None, int(last) if last else None)


def _read(name: str, data: str | None) -> tuple[list[Any], str]:
    """Rows, and their source for messages; a split of ``data`` wins over a file of that name."""
    if data is not None:
        path = Path(data)
        if path.is_dir():
            return _read_folder(path, name)
        if path.is_file():
            if name in ("", "train", str(path)):
                return _read_file(path), str(path)
            if not Path(name).is_file():
                raise NoSuchSplitError(
                    f"{data} is a file and has no split {name!r}; name the files themselves, "
                    "or a folder that holds them"
                )
        elif path.suffix in SUFFIXES or data.startswith((".", "/", "~")):
            raise UserError(f"no file or folder {data!r}")
        elif not Path(name).is_file():
            return _read_hub(data, name), f"{data}/{name}"
    path = Path(name)
    if path.is_file():
        return _read_file(path), str(path)
    if data is None and not path.suffix:
        raise NoSuchSplitError(
            f"no file {name!r}; to use it as a split, say which data with --data"
        )
    raise NoSuchSplitError(f"no file {name!r}")


def _read_folder(folder: Path, name: str) -> tuple[list[Any], str]:
    for path in (folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)):
        if path.is_file():
            return _read_file(path), str(path)
    if Path(name).is_file():
        return _read_file(Path(name)), name
    splits = sorted(path.stem for path in folder.iterdir() if path.suffix in SUFFIXES)
    raise NoSuchSplitError(
        f"unknown split {name!r}: {folder} has {', '.join(splits) or 'no .json or .jsonl file'}"
    )


def _read_file(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold other line ends
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON: {error.msg}") from error
    return rows


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
