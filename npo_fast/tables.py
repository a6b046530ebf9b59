"""Tables as plain text and as Markdown, with one number format (HTML: ``report/templates``).

A table is rows of cells under a header, in this order of arguments everywhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Cells = list[list[Any]]

_ESCAPES = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "&lt;", "\n": " "})  # in Markdown


def number(value: float) -> str:
    """Four significant digits; scientific notation below 0.001, as for small p-values."""
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


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
    lines = [list(header), *([text(cell) for cell in row] for row in rows)]
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


def _markdown_cell(cell: Any) -> str:
    return markdown_text(text(cell))


def markdown_text(words: str) -> str:
    """Words as one line of Markdown that shows them as they are."""
    return words.translate(_ESCAPES)
