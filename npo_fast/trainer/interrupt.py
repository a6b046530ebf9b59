"""Ctrl-C and SIGTERM: the run ends after the current step, and can be resumed."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from npo_fast.distributed import is_lost_contact, is_main_process, world_size

_MESSAGE_OF_SEVERAL = b"\nstopping after this step\n"
_MESSAGE = b"\nstopping after this step; a second signal stops at once\n"


class StopSignal:
    """Inside, the first SIGINT or SIGTERM only sets ``number``; a second one ends the process.

    Several processes ignore further signals, since they must agree where to stop: ``torchrun``
    repeats a Ctrl-C that the terminal has sent already, and kills what has not ended 30 s later.
    They also ignore them after contact is lost, for ``torchrun`` ends whom it does not know to be
    about to say so.
    Handlers can be set from the main thread alone: in another one signals stay as they are.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, _: object = None, error: object = None, __: object = None) -> None:
        if world_size() > 1 and isinstance(error, BaseException) and is_lost_contact(error):
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_first, self.number = self.number is None, number
        # os.write, since a handler may not touch the buffered streams
        if world_size() == 1:
            self.__exit__()
            _say(_MESSAGE)
        elif is_first and is_main_process():
            _say(_MESSAGE_OF_SEVERAL)


def _say(message: bytes) -> None:
    with suppress(OSError):  # standard error may be a file on a full disk
        os.write(2, message)
