"""What a person sees: messages on standard error, results on standard output.

They hold texts from data, models and names of files: what would steer a terminal is written out.
"""

import json
import logging
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from tqdm import tqdm

from npo_fast.distributed import is_main_process
from npo_fast.tables import printable

_FORMAT_WARNING = warnings.formatwarning


class Output(NamedTuple):
    """The result of a subcommand, which ``--json`` prints, and a text for people."""

    result: Mapping[str, Any]
    text: str
    exit_code: int = 0


class _StandardError(logging.Handler):
    """Writes messages of the first process above a progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_main_process():
            with suppress(OSError):  # standard error may be a file on a full disk
                tqdm.write(printable(record.getMessage()), file=sys.stderr)


def show_messages() -> None:
    """Prints what the library logs: what it loads, trains, saves, warns of."""
    warnings.formatwarning = _format_warning
    logger = logging.getLogger("npo_fast")
    logger.handlers = [_StandardError()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.getLogger("npo_fast.runs").setLevel(logging.NOTSET)


def show(output: Output, as_json: bool) -> None:
    """Prints the text, or the result as one JSON object.

    JSON knows neither NaN nor infinity: they become null.
    """
    text = output.text
    if as_json:
        content = json.dumps(output.result, default=str)
        text = json.dumps(json.loads(content, parse_constant=lambda name: None))
    if is_main_process():
        print(printable(text), flush=True)


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    return printable(_FORMAT_WARNING(message, category, filename, lineno, line))
