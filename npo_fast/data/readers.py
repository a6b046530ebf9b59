"""Records by name or from memory: files, folders, data sets of the hub, rows."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from npo_fast.boundary import check_folder
from npo_fast.data.files import KINDS, read_file, split_suffix
from npo_fast.data.forms import LossOn, parse_row
from npo_fast.data.records import Record, Records
from npo_fast.errors import NoSuchSplitError, UserError, first_line, reading, short
from npo_fast.offline import hub

LONGEST_NAME = 255  # of a file
IN_MEMORY = "(rows)"  # in the place of a name
_SLICE = re.compile(r"^(?P<name>.*?)\[(?P<first>[^:\[\]]*):(?P<last>[^:\[\]]*)\]$", re.S)
_BOUND = re.compile(r"-?[0-9]{1,18}")  # a number that an index can be
_NO_DATA = ("dataset_dict", "dataset_info", "dataset_infos")  # what the library writes beside data
_SHARD = re.compile(r"^(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?$")


def load_records(
    source: Records, data: str | None = None, role: str = "data", loss_on: LossOn = "last"
) -> list[Record]:
    """Records of one split, by name or from rows in memory; ``docs/data.md`` shows every form.

    Args:
        source: a file or folder, or the name of a split of ``data``; any may end in a slice of its
            rows such as ``forget05[:160]`` or ``mine.jsonl[-40:]``. Or rows: dicts with the keys of
            a file's records, a ``datasets.Dataset``, a data frame, or ``Record`` objects, which
            stay as they are.
        data: a folder with files or folders by the names of the splits, a file, or a hub dataset
            such as ``locuslab/TOFU`` (a configuration of that name, else a split;
            ``configuration/split`` names both).
        role: what messages call rows in memory.
        loss_on: of a conversation the "last" answer is a record, or "all" its answers are one each.

    Raises:
        NoSuchSplitError: no such file or split (the message lists those there are).
        UserError: no record at all, or one in no known form (the message names file and record).
    """
    numbered, where = load_rows(source, data, role)
    records: list[Record] = []
    for number, row in numbered:
        whole = isinstance(row, Record)
        records += [row] if whole else parse_row(row, f"{where}, record {number}", loss_on)
    return records


def load_rows(
    source: Records, data: str | None = None, role: str = "data"
) -> tuple[list[tuple[int, Any]], str]:
    """Rows as they are, each with its number, and where they are from; see ``load_records``."""
    if isinstance(source, (str, Path)):
        name, part = _parse_slice(str(source))
        rows, where = _read(name, data)
        if not rows:
            raise UserError(f"{where} is empty: it holds no record")
    else:
        rows, part, where = as_rows(source, role), slice(None), role
        if not rows:
            raise UserError(f"{where} holds no record")
    numbered = list(enumerate(rows, 1))[part]
    if not numbered:
        raise UserError(f"{str(source)!r} selects no record: {where} holds {len(rows)}")
    return numbered, where


def as_rows(source: Records | None, role: str) -> Any:
    """A name or None as it is; rows as a list, so that a generator can be read twice.

    Raises:
        UserError: it is neither; the message names the argument ``role``.
    """
    if source is None or isinstance(source, (str, Path)):
        return source
    table: Any = source
    if isinstance(source, Mapping) and any(
        hasattr(each, "with_format") for each in source.values()
    ):
        raise UserError(
            f"{role} is a DatasetDict with the splits {', '.join(map(str, source))}: give one of "
            "them, such as dataset['train']"
        )
    if hasattr(table, "iterrows"):  # pandas, which before version 3 leaves its NA in the rows
        return table.astype(object).where(table.notna(), None).to_dict("records")
    if hasattr(table, "to_pylist"):  # pyarrow
        return table.to_pylist()
    if hasattr(table, "with_format"):  # datasets, which may make tensors of what it holds
        table = table.with_format(None)
    usable = isinstance(table, Iterable) and not isinstance(table, Mapping)
    rows = list(table) if usable else [None]
    if rows and not isinstance(rows[0], (Record, Mapping)):  # other tables give column names
        raise UserError(
            f'{role} must be a file, a split or rows (dicts such as {{"text": …}}, Record objects, '
            f"a datasets.Dataset, a pandas.DataFrame), got {type(source).__name__}"
        )
    return rows


def describe(source: Records | None) -> Any:
    """A name or None as ``run.json`` has it; rows in memory have no name."""
    if source is None:
        return None
    return str(source) if isinstance(source, (str, Path)) else IN_MEMORY


def _parse_slice(name: str) -> tuple[str, slice]:
    match = _SLICE.match(name)
    if match is None or os.path.exists(name):  # a file may be called so
        return name, slice(None)
    bounds = match.group("first", "last")
    if wrong := [bound for bound in bounds if bound and not _BOUND.fullmatch(bound)]:
        raise UserError(
            f"{short(wrong[0])} in {short(name)} is no place of a record: a slice is such as "
            "[:160], [40:80] or [-40:]"
        )
    first, last = (int(bound) if bound else None for bound in bounds)
    return match["name"], slice(first, last)


def _read(name: str, data: str | None) -> tuple[list[Any], str]:
    """Rows, and their source for messages; a split of ``data`` wins over a file of that name."""
    path = Path(name)
    if data is None:
        if name and os.path.exists(name):  # False for a text that is too long for a name
            return _read_path(path), name
        cure = "" if split_suffix(name)[1] else "; to use it as a split, say which data with --data"
        if len(name) > LONGEST_NAME or "\n" in name:
            name, cure = f"{name[:40]}…", '; a text itself is a row, [{"text": …}]'
        raise NoSuchSplitError(f"no file {name!r}{cure}")
    folder = Path(data)
    is_one_set = folder.is_file() or _is_saved(folder)
    if (folder.exists() and name in ("", data)) or (is_one_set and name == "train"):
        return _read_path(folder), data
    place = folder / name  # the last part is a split; folders before it, a configuration
    splits = _splits(place.parent) if name and not is_one_set else {}
    if place.name in splits:
        files = _whole(name, splits[place.name])
        return _read_all(files), str(files[0] if len(files) == 1 else place)
    for file in (place, path):  # by its whole name, or elsewhere
        if os.path.isfile(file) or (os.path.isdir(file) and (file != path or "/" in name)):
            return _read_path(file), str(file)
    if is_one_set:
        raise NoSuchSplitError(
            f"{data} is one data set and has no split {name!r}; name the files themselves, or a "
            "folder that holds them"
        )
    if folder.is_dir():
        raise NoSuchSplitError(f"unknown split {name!r}: {folder} has {_names(folder, splits)}")
    if split_suffix(data)[1] or data.startswith((".", "/", "~")):
        raise UserError(f"no file or folder {data!r}")
    return _read_hub(data, name), f"{data}/{name}"


def _read_path(path: Path) -> list[Any]:
    """Rows of a file, a saved data set, a folder of texts, or one that has a single split."""
    if not path.is_dir():
        return read_file(path)
    if _is_saved(path):
        return _read_saved(path)
    files = [(split_suffix(file.name)[1], file) for file in sorted(path.rglob("[!.]*"))]
    files = [(suffix, file) for suffix, file in files if suffix and file.is_file()]
    if files and all(suffix.lower().startswith(".txt") for suffix, _ in files):
        return _read_all(file for _, file in files)
    splits = _splits(path)
    if len(splits) == 1:
        return _read_all(_whole(*splits.popitem()))
    raise UserError(
        f"{path} is a folder with {_names(path, splits)}; name a file, or a split with "
        f"--data {path}"
    )


def _names(folder: Path, splits: Iterable[str]) -> str:
    """What can be named in a folder, in words."""
    others = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    return ", ".join(dict.fromkeys((*splits, *others))) or f"no {KINDS} file"


def _read_all(paths: Iterable[Path]) -> list[Any]:
    return [row for path in paths for row in _read_path(path)]


def _splits(folder: Path) -> dict[str, list[Path]]:
    """Files and saved folders by split, as ``save_to_disk``, the hub and people lay them out."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(p for f in (folder, folder / "data") if f.is_dir() for p in f.iterdir()):
        stem, suffix = split_suffix(path.name)
        shard = _SHARD.match(stem)
        if path.is_dir() and _is_saved(path):
            splits.setdefault(path.name, []).append(path)
        elif suffix and path.is_file() and stem not in _NO_DATA and not stem.startswith("."):
            splits.setdefault(shard["split"] if shard else stem, []).append(path)
    return splits


def _whole(name: str, files: list[Path]) -> list[Path]:
    """The files of a split: one, or all of its shards.

    Raises:
        UserError: a shard is missing, or the split is there in several forms.
    """
    shards = [_SHARD.match(split_suffix(file.name)[0]) for file in files]
    if len(files) == 1 and shards[0] is None:
        return files
    numbers = {int(shard["number"]) for shard in shards if shard}
    counts = {int(shard["count"]) for shard in shards if shard}
    if len(numbers) < len(files) or len(counts) > 1:
        found = " and ".join(str(file) for file in files)
        raise UserError(f"the split {name!r} is in {found}: remove one, or write its whole name")
    if len(numbers) < min(counts):
        raise UserError(
            f"{files[0].parent} has {len(numbers)} of the {min(counts)} files of the split "
            f"{name!r}: fetch the others"
        )
    return files


def _is_saved(path: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` wrote the folder."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _read_saved(folder: Path) -> list[Any]:
    import datasets  # takes a second to import, and files do not need it

    check_folder(folder)
    with reading(f"the data set in {folder}"):
        rows: Any = datasets.load_from_disk(str(folder))
        rows.data.table.validate(full=True)  # a damaged offset would end the process
        return list(rows.to_list())


def _read_hub(data: str, name: str) -> list[Any]:
    import datasets  # takes a second to import, and files do not need it

    configuration, slash, split = name.partition("/")
    cure = "if it is meant as a folder, check the path"
    what = f"the dataset {data!r}"
    with reading(what, cure), hub(what):
        try:
            if slash:
                return list(datasets.load_dataset(data, configuration, split=split).to_list())
            if name in datasets.get_dataset_config_names(data):
                return list(datasets.load_dataset(data, name, split="train").to_list())
            return list(datasets.load_dataset(data, split=name).to_list())
        except ValueError as error:
            raise NoSuchSplitError(
                f"dataset {data!r} has no configuration or split {name!r}: {first_line(error)}"
            ) from error
