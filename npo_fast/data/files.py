"""What a file holds: rows of JSON, CSV or parquet, or one text; compressed or not."""

import bz2
import csv
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from npo_fast.boundary import parse_json, read_bytes
from npo_fast.data.forms import MEANT, OTHER_TEXTS
from npo_fast.errors import UserError, reading, short

SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt", ".csv", ".tsv", ".parquet")
KINDS = ", ".join(SUFFIXES)
_SUFFIX = re.compile(
    rf"(?:{'|'.join(map(re.escape, SUFFIXES))})(?:\.(?:gz|bz2|xz|zst))?$", re.IGNORECASE
)
_LISTS = ("messages", "conversations", *OTHER_TEXTS)  # columns of CSV that hold JSON
_MOST_UNPACKED = 2**31  # bytes; a small file may unpack to more than the memory
_BOMS = (  # the longer before those that they begin with
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


def split_suffix(name: str) -> tuple[str, str]:
    """The name of a data file without its suffixes, and these, such as ``.jsonl.gz``."""
    match = _SUFFIX.search(name)
    return (name[: match.start()], match[0]) if match else (name, "")


def read_file(path: Path) -> list[Any]:
    """The rows of a file, by its suffix; a file with another one may hold JSON.

    A .txt file is one row ``{"text": …}``; an object that holds one list of objects is that list.

    Raises:
        UserError: the file is damaged or of another kind; the message names file and line.
    """
    suffix = split_suffix(path.name)[1].lower()
    if suffix.startswith(".parquet"):
        return _read_parquet(path)
    try:
        text = read_text(path)
    except UserError as error:
        if suffix:
            raise
        raise UserError(f"{path} is no kind of file that is read: {KINDS} ({error})") from error
    if suffix.startswith(".txt"):
        return [{"text": text.removesuffix("\n")}] if text.strip() else []
    if suffix.startswith((".csv", ".tsv")):
        return list(_read_csv(text, path, "\t" if suffix.startswith(".tsv") else ",;\t"))
    if not suffix and text.strip() and text.lstrip()[0] not in "[{":
        raise UserError(f"{path} is no kind of file that is read: {KINDS}")
    return _read_json(text, path, lines=not suffix.startswith(".json") or ".jsonl" in suffix)


def read_text(path: Path) -> str:
    """The text of a file, in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark.

    Lines end in "\\n" alone, as in any file that Python opens as text.

    Raises:
        UserError: the file cannot be read, is damaged, or is not text.
    """
    content = _unpacked(path)
    encoding = next((name for bom, name in _BOMS if content.startswith(bom)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not {encoding.upper()} text: {error}; save it as such"
        ) from error
    if "\0" in text:
        raise UserError(
            f"{path} holds NUL characters: it is not text, or UTF-16 without a byte-order mark; "
            "save it as UTF-8"
        )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removeprefix("\ufeff").replace("\n\ufeff", "\n")  # files that were put together


def _unpacked(path: Path) -> bytes:
    """The bytes of a file; whether they are compressed is seen by how they begin."""
    content = read_bytes(path)
    packed: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
        (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
        (b"BZh", bz2.BZ2File),
        (b"\xfd7zXZ\0", lzma.LZMAFile),
        (b"\x28\xb5\x2f\xfd", _zstd_file),
    )
    for magic, opened in packed:
        if content.startswith(magic) and (magic != b"BZh" or path.suffix == ".bz2"):
            with reading(path, "it is damaged, or cut short"):
                return _read_all(opened(io.BytesIO(content)), path)
    return content


def _read_all(file: Any, path: Path) -> bytes:
    unpacked = io.BytesIO()
    while block := file.read(1 << 22):
        unpacked.write(block)
        if unpacked.tell() > _MOST_UNPACKED:
            raise UserError(f"{path} unpacks to more than {_MOST_UNPACKED >> 30} GiB: split it")
    return unpacked.getvalue()


def _zstd_file(file: Any) -> Any:
    import pyarrow as pa

    return pa.input_stream(file, compression="zstd")


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow.parquet as pq  # takes a while to import, and other files do not need it

    content = _unpacked(path)
    with reading(path, "it is not a parquet file, or damaged"):
        table = pq.ParquetFile(io.BytesIO(content)).read()
        table.validate(full=True)  # a damaged offset would end the process
        return list(table.to_pylist())


def _read_csv(text: str, path: Path, delimiters: str) -> Iterator[dict[str, Any]]:
    """Rows by the names of the first line, which has the delimiter more often than others."""
    header = text.partition("\n")[0]
    delimiter = max(delimiters, key=header.count)
    limit = csv.field_size_limit(max(len(text), 1))  # a setting of the process; a field is a text
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = [name.strip() for name in next(lines, [])]
        named = [name for name in names if name]  # pandas' index has none
        if len(set(named)) < len(named):
            raise UserError(f"{path}, line 1: two columns have one name, found {short(names)}")
        for values in lines:
            where = f"{path}, line {lines.line_num}"
            if not values:
                continue
            if len(values) != len(names):
                raise UserError(
                    f"{where}: {len(values)} values for {len(names)} columns; quote texts that "
                    f"hold {delimiter!r}, a quote or a line end"
                )
            row = dict(zip(names, values, strict=True))
            row.pop("", None)
            yield {key: _cell(key, value, where) for key, value in row.items()}
    except csv.Error as error:
        raise UserError(f"{path}, line {lines.line_num}: not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _cell(name: str, value: str, where: str) -> Any:
    if name not in _LISTS or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json(value)
    except UserError as error:
        raise UserError(
            f'{where}: "{name}" begins like a list and is none ({error}): write lists as JSON, '
            'such as ["one", "two"]'
        ) from error


def _read_json(text: str, path: Path, lines: bool) -> list[Any]:
    """One value a line, or one value on many lines, whatever the name of the file says."""
    values, failed = _parse_lines(text)
    if failed and not values:
        try:
            values, failed = [parse_json(text)], None
        except UserError as error:
            if not lines or text.lstrip()[0] == "[":
                failed = getattr(error.__cause__, "lineno", 1), error
    if failed:
        number, reason = failed
        raise UserError(f"{path}, line {number}: {reason}") from reason
    if len(values) != 1:
        return values
    (value,) = values
    if isinstance(value, dict) and not value.keys() & MEANT:
        lists = [each for each in value.values() if isinstance(each, list)]
        if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
            return list(lists[0])
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return [{"text": text} for text in value]
    return value if isinstance(value, list) else values


def _parse_lines(text: str) -> tuple[list[Any], tuple[int, UserError] | None]:
    """The values of the lines, as far as the first that is none: its number and what is wrong."""
    values = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold other line ends
        try:
            if line.strip():
                values.append(parse_json(line))
        except UserError as error:
            return values, (number, error)
    return values, None
