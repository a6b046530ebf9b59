"""A watch over the processes that train one model: one that fails is named, and the others end.

A process that hangs or dies leaves the others in a collective that nobody completes, with nothing
to tell them. So each process has two daemon threads. One writes a record of its process into the
key-value store in which they met, once a second, and reads the records of the others. The second
one judges what was read; it waits for nobody, since the store may be on the machine that is gone.
The process ends with a message and exit code 1 where another one

- gives no sign of life for ``limits.SILENT_LIMIT_S``, or is gone from this machine;
- has failed and said so, and this one has not noticed for ``NOTICE_S``;
- lives, and has not come to the collective in which the others wait for ``HANG_LIMIT_S``.

A process that computes for long is none of these: its threads go on. Nor is one that saves
(``undisturbed``), which also does not end before it has written what it writes alone.
"""

import atexit
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field

import torch.distributed as dist

from npo_fast.errors import UserError, one_line
from npo_fast.tables import printable
from npo_fast.watch import limits
from npo_fast.watch.place import THREAD_NAME, Collectives, detail, enter, main_frame, place
from npo_fast.watch.verdict import (
    BEREFT,
    FAILED,
    LEFT,
    RUNNING,
    Process,
    Record,
    machine_name,
    verdict,
)

__all__ = ["detail", "enter", "error_line", "failure_of_others", "start", "stop", "tell_others",
           "undisturbed"]  # fmt: skip

ADVICE = "after its last checkpoint (--save-every) the same command, without --overwrite, goes on"


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
        self._collectives, self._beat, self._machine = Collectives(), 0, machine_name()
        self._asked = self._answered = 0  # exchanges
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"{THREAD_NAME} {work.__name__}")
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
        self.exchange(2 * limits.INTERVAL_S)
        with self._changed:
            self.stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(2 * limits.INTERVAL_S)

    def _exchange_records(self) -> None:
        last = time.monotonic()
        while not self.stopped:
            with self._changed:
                self._changed.wait_for(
                    lambda: self.stopped or self._asked > self._answered, limits.INTERVAL_S
                )
                number = self._asked
            now = time.monotonic()
            # this process may have been stopped meanwhile, and with it all of them
            elapsed, last = min(now - last, 2 * limits.INTERVAL_S), now
            try:
                self._exchange(elapsed)
            except Exception:  # whatever a library says when the store is gone; _judge tells it
                with self._changed:
                    self._changed.wait_for(lambda: self.stopped, limits.INTERVAL_S)
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
        return Record(
            self._beat, self._machine, os.getpid(), self.state, self.reason, calls, collective,
            place(), main_frame(), self.saving,
        )  # fmt: skip

    def _judge(self) -> None:
        collectives, calls, last = Collectives(), 0, time.monotonic()
        doomed_s = stuck_s = 0.0
        while not self.stopped:
            time.sleep(limits.INTERVAL_S / 4)
            now = time.monotonic()
            elapsed, last = min(now - last, limits.INTERVAL_S), now
            self.unanswered_s += elapsed
            before, (calls, collective) = calls, collectives.look()
            stuck_s = stuck_s + elapsed if collective and calls == before else 0.0
            reason = verdict(self.own, self.others, self.hang_limit_s)
            if reason is None and min(self.unanswered_s, stuck_s) > limits.SILENT_LIMIT_S:
                reason = (
                    f"{_store_name()} has given no answer for {self.unanswered_s:.0f} s, and "
                    f"{collective} does not end: its machine or process is gone"
                )
            doomed_s = 0.0 if reason is None else doomed_s + elapsed
            if (
                reason is not None
                and doomed_s > limits.NOTICE_S
                and self.judges
                and (collective or not self.saving)  # what it writes alone, it may end
            ):
                self._end(reason)

    def _end(self, reason: str) -> None:
        self.state, self.reason = BEREFT, reason
        self.exchange(2 * limits.INTERVAL_S)
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
    text = os.environ.get(limits.HANG_VARIABLE, str(limits.HANG_LIMIT_S))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise UserError(f"{limits.HANG_VARIABLE} is {text!r}: it takes a number of seconds above 0")
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
        _watch.exchange(2 * limits.INTERVAL_S)


def failure_of_others(wait_s: float = limits.QUIET_S + 2 * limits.INTERVAL_S) -> str | None:
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
        if not watch.exchange(limits.INTERVAL_S):
            for process in watch.others:
                process.silent_s = max(
                    process.silent_s, 2 * limits.INTERVAL_S
                )  # enough to look for it
        found = [p.failure(limits.QUIET_S) for p in watch.others]
        told = [f for p, f in zip(watch.others, found, strict=True) if p.record and p.record.reason]
        if failures := [failure for failure in told or found if failure is not None]:
            return "; ".join(failures)
        records = (p.record for p in watch.others if p.record is not None)
        if reason := next((r.reason for r in records if r.state == BEREFT and r.reason), None):
            return reason  # that one has found out, and ended
        if time.monotonic() > ends:
            if watch.unanswered_s > limits.QUIET_S:
                return f"nor does {_store_name()} answer: its machine or process is gone"
            left = [str(p.rank) for p in watch.others if p.record and p.record.state == LEFT]
            return f"process {' and '.join(left)} has ended" if left else None
        time.sleep(limits.INTERVAL_S / 4)


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
