"""What a person sees: messages on standard error, results on standard output."""

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

from npo_fast.distributed import is_main_process


class _StandardError(logging.Handler):
    """Writes messages of the first process above a progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_main_process():
            tqdm.write(record.getMessage(), file=sys.stderr)


def show_messages() -> None:
    """Prints what the library logs: what it loads, trains, saves."""
    logger = logging.getLogger("npo_fast")
    logger.handlers = [_StandardError()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def show(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Prints the result of a subcommand: the text, or one JSON object."""
    if is_main_process():
        print(json.dumps(result, default=str) if as_json else text, flush=True)


def table(rows: Iterable[Iterable[str]], header: Iterable[str]) -> str:
    """Columns padded to their widest cell."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def number(value: float) -> str:
    """Four significant digits, small p-values as powers of ten."""
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
