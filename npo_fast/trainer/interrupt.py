"""Ctrl-C and SIGTERM as a wish: the run ends after the step it is in, and can go on later."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from npo_fast.distributed import is_main_process, world_size

_NOTE_OF_RANKS = b"\nstopping after this step\n"
_NOTE = b"\nstopping after this step; a second signal stops at once\n"


class StopSignal:
    """Inside, the first SIGINT or SIGTERM is only noted, in ``number``; a second does its worst.

    Of several ranks all go on until they agree to stop, however often they are told: ``torchrun``
    repeats the Ctrl-C that the terminal has sent them, and kills what has not ended 30 s later.

    Handlers can be set from the main thread alone: in another one signals stay as they are.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if world_size() > 1:
            if self.number is None and is_main_process():
                os.write(2, _NOTE_OF_RANKS)
            self.number = number
            return
        self.number = number
        for each, handler in self._before.items():
            signal.signal(each, handler)
        os.write(2, _NOTE)  # a handler may not touch the buffered streams
