"""What a process says of itself, what others know of it, and what follows."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from npo_fast.watch import limits

# a process that left has ended as it should; one that is bereft ends since another one failed
RUNNING, LEFT, FAILED, BEREFT = "running", "left", "failed", "bereft"


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
        if self.silent_s >= min(quiet_s, 2 * limits.INTERVAL_S) and is_gone(self.record):
            return f"process {self.rank} is gone: it was killed, or has crashed"
        if self.silent_s >= quiet_s:
            return f"process {self.rank} has given no sign of life for {self.silent_s:.0f} s"
        return None


def verdict(own: Process, others: list[Process], hang_limit_s: float) -> str | None:
    """Why this process cannot go on, in a sentence; None where it can."""
    processes = sorted([own, *others], key=lambda process: process.rank)
    records = [process.record for process in processes if process.record is not None]
    for other in others:
        if (failure := other.failure(limits.SILENT_LIMIT_S)) is not None:
            told = [own.record, *(p.record for p in others if p is not other)]
            waiting = next((r for r in told if r is not None and r.collective), None)
            wait = waiting and f", and the others wait for it in {waiting.collective_and_place}"
            return f"{failure}{wait or ''}"
        if other.record is None and other.silent_s > limits.MEETING_LIMIT_S:
            return f"process {other.rank} has not come for {other.silent_s:.0f} s"
    if len(records) < len(processes) or any(record.saving for record in records):
        return None
    last = max(record.calls for record in records)
    waiting = next((r for r in records if r.calls == last and r.collective), None)
    if waiting is None or any(process.still_s < hang_limit_s for process in processes):
        return None
    what, limit = waiting.collective_and_place, f"{hang_limit_s:.0f} s ({limits.HANG_VARIABLE})"
    pairs = zip(processes, records, strict=True)
    late = [f"process {p.rank} {r.where}" for p, r in pairs if r.calls < last]
    if not late:
        return f"no process has come out of {what} for {limit}"
    return f"the others have waited in {what} for {limit}, and {'; '.join(late)}"


@cache
def machine_name() -> str:
    """What processes share that see the same process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def is_gone(record: Record) -> bool:
    """Whether a process of this machine does not exist any more."""
    if record.machine != machine_name():
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
