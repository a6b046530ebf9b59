"""Ctrl-C and SIGTERM: the run ends after the current step, and can be resumed."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from npo_fast.distributed import is_main_process, world_size

_MESSAGE_OF_SEVERAL = b"\nstopping after this step\n"
_MESSAGE = b"\nstopping after this step; a second signal stops at once\n"


class StopSignal:
    """Inside, the first SIGINT or SIGTERM only sets ``number``; a second one ends the process.

    Several processes ignore further signals, since they must agree where to stop: ``torchrun``
    repeats a Ctrl-C that the terminal has sent already, and kills what has not ended 30 s later.

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if world_size() > 1:
            if self.number is None and is_main_process():
                os.write(2, _MESSAGE_OF_SEVERAL)
            self.number = number
            return
        self.number = number
        for handled, handler in self._handlers.items():
            signal.signal(handled, handler)
        os.write(2, _MESSAGE)  # a handler may not touch the buffered streams
