"""Faults on purpose: what the other parts may meet on a card, for the tests of the frame."""

import os
import signal
import time

import torch

from gpu_parts.record import Record


def run(record: Record, device: torch.device, tiny: bool, job: str) -> None:
    if job == "endless":
        while True:
            record.attempt("short", lambda: time.sleep(0.2))
            record.row("rows", "endless", seconds=1.0)
    record.attempt("before", lambda: record.row("rows", "before", seconds=1.0))
    record.attempt("raises", lambda: [][0])
    record.attempt("crashes", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    record.attempt("hangs", lambda: time.sleep(1000))
    record.attempt("after", lambda: record.row("rows", "after", seconds=1.0))
    raise RuntimeError("outside of any attempt")
