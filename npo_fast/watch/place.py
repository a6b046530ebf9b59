"""Where a process is: the step, the line of its main thread, and the collective it waits in."""

import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

THREAD_NAME = "npo_fast watch"  # of the threads that look
WAIT = "wait_for_"  # and a collective: a function of ours

_stage, _detail = "", ""


def enter(stage: str) -> None:
    """Says what this process begins, such as "step 12": messages about a failure name it."""
    global _stage, _detail
    _stage, _detail = stage, ""


def detail(text: str) -> None:
    """Says which part of the stage begins, such as "micro-batch 3 of 4"."""
    global _detail
    _detail = text


def place() -> str:
    """Where this process is, such as "step 12, micro-batch 3 of 4"."""
    return f"{_stage}, {_detail}" if _detail else _stage


def main_frame() -> str:
    """Where the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


class Collectives:
    """How many collectives this process has begun, and in which it waits."""

    def __init__(self) -> None:
        self._unfinished: tuple[str, int] | None = None
        self._name = ""

    def look(self) -> tuple[int, str | None]:
        """From PyTorch's flight recorder; without one, from the frames of all threads."""
        if not dist.is_initialized():
            return 0, None
        groups = _flight_record(False).get("pg_status", {})
        if not groups:
            group: Any = dist.group.WORLD
            return group._get_sequence_number_for_group(), _call_of_some_thread()
        calls, unfinished = 0, None
        for name, status in groups.items():
            begun, ended = status["last_enqueued_collective"], status["last_completed_collective"]
            calls += max(0, begun)
            if ended < begun:
                unfinished = name, max(0, ended) + 1
        if unfinished is None:
            return calls, None
        if unfinished != self._unfinished:
            self._unfinished, self._name = unfinished, _name_of(*unfinished)
        return calls, self._name


def _flight_record(with_entries: bool) -> dict[str, Any]:
    """PyTorch's record of collectives, without stack traces; {} where it keeps none."""
    bindings = torch._C._distributed_c10d
    kind = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
    dump: Callable[[bool, bool, bool], bytes] | None = getattr(bindings, kind, None)
    return {} if dump is None else pickle.loads(dump(with_entries, False, False))


def _name_of(group: str, number: int) -> str:
    for entry in reversed(_flight_record(True).get("entries", [])):
        if entry["process_group"][0] == group and entry["collective_seq_id"] == number:
            return str(entry["profiling_name"]).rpartition(":")[2].lstrip("_")
    return f"collective {number}"


def _call_of_some_thread() -> str | None:
    """The function of ``torch.distributed`` in which a thread of this process is.

    What one waits for that has been begun earlier stands in the name of ours: ``wait_for_…``.
    """
    watching = {t.ident for t in threading.enumerate() if t.name.startswith(THREAD_NAME)}
    for thread, innermost in sys._current_frames().items():
        frame: FrameType | None = None if thread in watching else innermost
        while frame is not None:
            name = frame.f_code.co_name
            if frame.f_code.co_filename == dist.distributed_c10d.__file__:
                return name
            if name.startswith(WAIT) and frame.f_globals["__name__"].startswith("npo_fast."):
                return name.removeprefix(WAIT)
            frame = frame.f_back
    return None
