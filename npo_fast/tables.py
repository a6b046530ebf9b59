"""Tables as plain text and as Markdown, with one number format (HTML: ``reports/templates``).

Cells hold texts from data, files and folders: none of them reaches a terminal as a control
character, or Markdown as markup.

A table is rows of cells under a header, in this order of arguments everywhere.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Cells = list[list[Any]]

# Control characters but line ends and tabs, what turns the direction of writing, half characters
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)
# Markdown's marks; an underscore inside a word is none
_MARKS = re.compile(r"[\\`*\[\]|~#]|(?<![^\W_])_|_(?![^\W_])")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def printable(text: str) -> str:
    """A text whose control characters are written out, such as ``\\x1b``, for a terminal."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def number(value: float) -> str:
    """Four significant digits; scientific notation below 0.001, as for small p-values."""
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def counted(number: int, what: str) -> str:
    """Such as "1 epoch" or "3 epochs"."""
    return f"{number} {what}{'s' * (number != 1)}"


def text(cell: Any) -> str:
    """A cell as it is printed: a float by ``number``, None as a dash."""
    if cell is None:
        return "–"
    return number(cell) if isinstance(cell, float) else str(cell)


def from_records(records: Sequence[Mapping[str, Any]]) -> tuple[Cells, list[str]]:
    """Rows and header of records by column; a column without any value is left out."""
    names = dict.fromkeys(name for record in records for name in record)
    header = [name for name in names if any(record.get(name) is not None for record in records)]
    return [[record.get(name) for name in header] for record in records], header


def plain(rows: Iterable[Iterable[Any]], header: Iterable[str]) -> str:
    """Columns padded to their widest cell, with a line of dashes under the header."""
    lines = [[_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(rows: Iterable[Iterable[Any]], header: Sequence[str]) -> str:
    """A Markdown table; cells are kept on one line and escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)


def markdown_text(text: str) -> str:
    """A text that Markdown shows as it is, but for code between backticks."""
    parts = re.split("(`[^`]+`)", _line(text))
    return "".join(part if i % 2 else _escaped(part) for i, part in enumerate(parts))


def code(text: str) -> str:
    """A text as code in Markdown, whatever it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, blank = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{blank}{_line(text)}{blank}{fence}"


def _markdown_cell(cell: Any) -> str:
    return _escaped(_line(cell))


def _escaped(text: str) -> str:
    return _MARKS.sub(r"\\\g<0>", text).translate(_HTML)


def _line(cell: Any) -> str:
    return printable(text(cell)).replace("\n", " ")
