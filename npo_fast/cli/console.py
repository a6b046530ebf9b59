"""What a person sees: messages on standard error, results on standard output."""

import json
import logging
import sys
from collections.abc import Mapping
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
    logging.getLogger("npo_fast.runs").setLevel(logging.NOTSET)


def show(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Prints the result of a subcommand: the text, or one JSON object.

    JSON knows neither NaN nor infinity: they become null.
    """
    if as_json:
        content = json.loads(json.dumps(result, default=str), parse_constant=lambda name: None)
        text = json.dumps(content)
    if is_main_process():
        print(text, flush=True)
