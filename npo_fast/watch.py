"""A watch over the processes that train one model: one that fails is named, and the others end.

A process that hangs or dies leaves the others in a collective that nobody completes, with nothing
to tell them. So each process has two daemon threads. One writes a record of its process into the
key-value store in which they met, once a second, and reads the records of the others. The second
one judges what was read; it waits for nobody, since the store may be on the machine that is gone.
The process ends with a message and exit code 1 where another one

- gives no sign of life for ``SILENT_LIMIT_S``, or is gone from this machine;
- has failed and said so, and this one has not noticed for ``NOTICE_S``;
- lives, and has not come to the collective in which the others wait for ``HANG_LIMIT_S``.

A process that computes for long is none of these: its threads go on. Nor is one that saves
(``undisturbed``), which also does not end before it has saved.
"""

import atexit
import json
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from npo_fast.errors import UserError, one_line
from npo_fast.tables import printable

INTERVAL_S = 1.0  # between two records of a process
QUIET_S = 4.0  # without a new record; enough to name a process once a collective has failed
NOTICE_S = 5.0  # within which a process notices by itself that another one failed
SILENT_LIMIT_S = 20.0  # with NOTICE_S less than the 30 s that torchrun leaves after a SIGTERM
MEETING_LIMIT_S = 1800.0  # until the last process has come: models load at different speeds
HANG_LIMIT_S = 600.0
HANG_VARIABLE = "NPO_FAST_COLLECTIVE_TIMEOUT_S"
ADVICE = "after its last checkpoint (--save-every) the same command, without --overwrite, goes on"

# a process that left has ended as it should; one that is bereft ends since another one failed
RUNNING, LEFT, FAILED, BEREFT = "running", "left", "failed", "bereft"
_THREAD = "npo_fast watch"


@dataclass(frozen=True)
class Record:
    """What a process says of itself."""

    beat: int = 0
    machine: str = ""
    process_id: int = 0
    state: str = RUNNING
    reason: str = ""  # where it has failed
    calls: int = 0  # collectives that it has begun
    collective: str | None = None  # the one in which it waits
    place: str = ""  # such as "step 12, micro-batch 3 of 4"
    frame: str = ""  # where its main thread is
    saving: bool = False

    @property
    def collective_and_place(self) -> str:
        """Such as "all_gather (step 12, micro-batch 3 of 4)"."""
        return f"{self.collective}" + f" ({self.place})" * bool(self.place)

    @property
    def where(self) -> str:
        """What the process does instead of waiting."""
        if self.state != RUNNING:
            return f"has {self.state}"
        return f"is still at {self.frame}" + f" ({self.place})" * bool(self.place)


@dataclass
class Process:
    """What this process knows of another one, or of itself, by its own clock."""

    rank: int
    record: Record | None = None
    silent_s: float = 0.0  # since its record changed
    still_s: float = 0.0  # since it has begun a collective

    def update(self, record: Record | None, elapsed_s: float) -> None:
        """Takes the record that was read ``elapsed_s`` after the last one."""
        before, self.record = self.record, record
        self.silent_s = 0.0 if record != before else self.silent_s + elapsed_s
        begun = record is not None and (before is None or record.calls != before.calls)
        self.still_s = 0.0 if begun else self.still_s + elapsed_s

    def failure(self, quiet_s: float) -> str | None:
        """What is wrong with it, if it is dead or said so; None where it lives, or is bereft."""
        if self.record is None or self.record.state in (BEREFT, LEFT):
            return None
        if self.record.state == FAILED:
            return f"process {self.rank} failed: {self.record.reason}"
        if self.silent_s >= min(quiet_s, 2 * INTERVAL_S) and _is_gone(self.record):
            return f"process {self.rank} is gone: it was killed, or has crashed"
        if self.silent_s >= quiet_s:
            return f"process {self.rank} has given no sign of life for {self.silent_s:.0f} s"
        return None


def verdict(own: Process, others: list[Process], hang_limit_s: float) -> str | None:
    """Why this process cannot go on, in a sentence; None where it can."""
    processes = sorted([own, *others], key=lambda process: process.rank)
    records = [process.record for process in processes if process.record is not None]
    for other in others:
        if (failure := other.failure(SILENT_LIMIT_S)) is not None:
            told = [own.record, *(p.record for p in others if p is not other)]
            waiting = next((r for r in told if r is not None and r.collective), None)
            wait = waiting and f", and the others wait for it in {waiting.collective_and_place}"
            return f"{failure}{wait or ''}"
        if other.record is None and other.silent_s > MEETING_LIMIT_S:
            return f"process {other.rank} has not come for {other.silent_s:.0f} s"
    if len(records) < len(processes) or any(record.saving for record in records):
        return None
    last = max(record.calls for record in records)
    waiting = next((r for r in records if r.calls == last and r.collective), None)
    if waiting is None or any(process.still_s < hang_limit_s for process in processes):
        return None
    what, limit = waiting.collective_and_place, f"{hang_limit_s:.0f} s ({HANG_VARIABLE})"
    pairs = zip(processes, records, strict=True)
    late = [f"process {p.rank} {r.where}" for p, r in pairs if r.calls < last]
    if not late:
        return f"no process has come out of {what} for {limit}"
    return f"the others have waited in {what} for {limit}, and {'; '.join(late)}"


# --- where this process is ------------------------------------------------------------------------

_stage, _detail = "", ""


def enter(stage: str) -> None:
    """Says what this process begins, such as "step 12": messages about a failure name it."""
    global _stage, _detail
    _stage, _detail = stage, ""


def detail(text: str) -> None:
    """Says which part of the stage begins, such as "micro-batch 3 of 4"."""
    global _detail
    _detail = text


def _frame() -> str:
    """Where the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


class _Collectives:
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
    """The function of ``torch.distributed`` in which a thread of this process is."""
    watching = {t.ident for t in threading.enumerate() if t.name.startswith(_THREAD)}
    for thread, innermost in sys._current_frames().items():
        frame: FrameType | None = None if thread in watching else innermost
        while frame is not None:
            if frame.f_code.co_filename == dist.distributed_c10d.__file__:
                return frame.f_code.co_name
            frame = frame.f_back
    return None


@cache
def _machine() -> str:
    """What processes share that see the same process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_gone(record: Record) -> bool:
    """Whether a process of this machine does not exist any more."""
    if record.machine != _machine():
        return False
    try:
        os.kill(record.process_id, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    with suppress(OSError):  # what nobody has waited for yet
        return (
            Path(f"/proc/{record.process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        )
    return False


# --- the threads ----------------------------------------------------------------------------------


@dataclass
class _Watch:
    store: dist.Store
    rank: int
    world_size: int
    hang_limit_s: float
    state: str = RUNNING
    reason: str = ""
    saving: bool = False
    judges: bool = True  # until the main thread tells of a failure itself
    stopped: bool = False
    unanswered_s: float = 0.0  # by the store
    own: Process = field(init=False)
    others: list[Process] = field(init=False)

    def __post_init__(self) -> None:
        self.own = Process(self.rank)
        self.others = [Process(r) for r in range(self.world_size) if r != self.rank]
        self._collectives, self._beat, self._machine = _Collectives(), 0, _machine()
        self._asked = self._answered = 0  # exchanges
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"{_THREAD} {work.__name__}")
            for work in (self._exchange_records, self._judge)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def exchange(self, timeout_s: float) -> bool:
        """Waits until what this process says is in the store, and that of the others is read."""
        with self._changed:
            self._asked = number = self._asked + 1
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._answered >= number, timeout_s)

    def stop(self) -> None:
        self.judges = False
        if self.state == RUNNING:
            self.state = LEFT
        self.exchange(2 * INTERVAL_S)
        with self._changed:
            self.stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(2 * INTERVAL_S)

    def _exchange_records(self) -> None:
        last = time.monotonic()
        while not self.stopped:
            with self._changed:
                self._changed.wait_for(
                    lambda: self.stopped or self._asked > self._answered, INTERVAL_S
                )
                number = self._asked
            now = time.monotonic()
            # this process may have been stopped meanwhile, and with it all of them
            elapsed, last = min(now - last, 2 * INTERVAL_S), now
            try:
                self._exchange(elapsed)
            except Exception:  # whatever a library says when the store is gone; _judge tells it
                with self._changed:
                    self._changed.wait_for(lambda: self.stopped, INTERVAL_S)
                continue
            with self._changed:
                self._answered, self.unanswered_s = number, 0.0
                self._changed.notify_all()

    def _exchange(self, elapsed_s: float) -> None:
        record = self._record()
        self.store.set(str(self.rank), json.dumps(asdict(record)))
        self.own.update(record, elapsed_s)
        come = [p for p in self.others if p.record or self.store.check([str(p.rank)])]
        texts = self.store.multi_get([str(process.rank) for process in come]) if come else []
        read = {p.rank: Record(**json.loads(text)) for p, text in zip(come, texts, strict=True)}
        for process in self.others:
            process.update(read.get(process.rank), elapsed_s)

    def _record(self) -> Record:
        self._beat += 1
        calls, collective = self._collectives.look()
        place = f"{_stage}, {_detail}" if _detail else _stage
        return Record(
            self._beat, self._machine, os.getpid(), self.state, self.reason, calls, collective,
            place, _frame(), self.saving,
        )  # fmt: skip

    def _judge(self) -> None:
        collectives, calls, last = _Collectives(), 0, time.monotonic()
        doomed_s = stuck_s = 0.0
        while not self.stopped:
            time.sleep(INTERVAL_S / 4)
            now = time.monotonic()
            elapsed, last = min(now - last, INTERVAL_S), now
            self.unanswered_s += elapsed
            before, (calls, collective) = calls, collectives.look()
            stuck_s = stuck_s + elapsed if collective and calls == before else 0.0
            reason = verdict(self.own, self.others, self.hang_limit_s)
            if reason is None and min(self.unanswered_s, stuck_s) > SILENT_LIMIT_S:
                reason = (
                    f"{_store_name()} has given no answer for {self.unanswered_s:.0f} s, and "
                    f"{collective} does not end: its machine or process is gone"
                )
            doomed_s = 0.0 if reason is None else doomed_s + elapsed
            if reason is not None and doomed_s > NOTICE_S and self.judges and not self.saving:
                self._end(reason)

    def _end(self, reason: str) -> None:
        self.state = BEREFT
        self.exchange(2 * INTERVAL_S)
        if self.judges:  # the main thread may have noticed in the meantime
            text = error_line(f"{reason}; {ADVICE}", self.rank, self.world_size)
            with suppress(OSError):
                os.write(2, text.encode())  # the main thread may hold the lock of sys.stderr
            os._exit(1)


def _store_name() -> str:
    address, port = (os.environ.get(f"MASTER_{name}", "?") for name in ("ADDR", "PORT"))
    return f"the store in which the processes met ({address}:{port})"


_watch: _Watch | None = None


def start(store: dist.Store, rank: int, world_size: int) -> None:
    """Begins to watch the processes that share ``store``; there must not be another watch."""
    global _watch
    text = os.environ.get(HANG_VARIABLE, str(HANG_LIMIT_S))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise UserError(f"{HANG_VARIABLE} is {text!r}: it takes a number of seconds above 0")
    # a client of its own: others wait while one waits for an answer
    client = store.clone()  # type: ignore[attr-defined]
    _watch = _Watch(client, rank, world_size, limit)
    _watch.start()
    atexit.register(stop)  # a thread that is inside of the store would crash at the end


def stop() -> None:
    """Ends the watch; the others hear that this process has left."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None
        atexit.unregister(stop)


def tell_others(reason: str) -> None:
    """Tells the others why this process is about to end; they say so, and end too."""
    if _watch is not None and _watch.state == RUNNING:
        _watch.state, _watch.reason = FAILED, one_line(reason)
        _watch.judges = False
        _watch.exchange(2 * INTERVAL_S)


def failure_of_others(wait_s: float = QUIET_S + 2 * INTERVAL_S) -> str | None:
    """Who has failed and why, after a collective has raised in the main thread.

    From then on it is the caller who reports the failure and ends this process.

    Returns:
        A sentence; None where within ``wait_s`` all others seem to live.
    """
    watch = _watch
    if watch is None:
        return None
    watch.judges = False
    if watch.state == RUNNING:
        watch.state = BEREFT
    ends = time.monotonic() + wait_s
    while True:
        if not watch.exchange(INTERVAL_S):
            for process in watch.others:
                process.silent_s = max(process.silent_s, 2 * INTERVAL_S)  # enough to look for it
        found = [p.failure(QUIET_S) for p in watch.others]
        told = [f for p, f in zip(watch.others, found, strict=True) if p.record and p.record.reason]
        if failures := [failure for failure in told or found if failure is not None]:
            return "; ".join(failures)
        if time.monotonic() > ends:
            if watch.unanswered_s > QUIET_S:
                return f"nor does {_store_name()} answer: its machine or process is gone"
            left = [str(p.rank) for p in watch.others if p.record and p.record.state == LEFT]
            return f"process {' and '.join(left)} has ended" if left else None
        time.sleep(INTERVAL_S / 4)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, this process saves: it may take its time, and ends after it whatever others do."""
    watch = _watch
    if watch is None:
        yield
        return
    watch.saving = True
    try:
        yield
    finally:
        watch.saving = False


def error_line(error: object, rank: int, world_size: int) -> str:
    """An error as the command line prints it, with the process where there are several."""
    which = f" (process {rank} of {world_size})" if world_size > 1 else ""
    return printable(f"npo-fast: error{which}: {error}") + "\n"
