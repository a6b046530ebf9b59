"""A process for one job: begun early, told when to go, ended when it hangs, begun again."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu.py"
TRIES = 6  # times that a job may begin
LEAST_AGAIN_S = 8.0  # to begin a job again, there must be so much left of its time


@dataclass
class Child:
    """A process that has imported what it needs, waits for a line, and measures one job."""

    part: int
    job: str
    arguments: argparse.Namespace
    skip: list[str] = field(default_factory=list)
    tries: int = 0

    def __post_init__(self) -> None:
        name = f"part-{self.part}-{self.job}"
        self.file = self.arguments.out / f".{name}.json"
        self.log = self.arguments.out / f".{name}.log"
        self.file.unlink(missing_ok=True)
        self.start()

    def start(self) -> None:
        self.tries += 1
        command = [
            sys.executable, str(SCRIPT), "--job", f"{self.part}:{self.job}",
            "--json", str(self.file), "--device", self.arguments.device,
            *(["--tiny"] if self.arguments.tiny else []),
        ]  # fmt: skip
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the tests' processes are many already
        if self.arguments.tiny:  # more threads wait for each other longer than they compute
            environment["OMP_NUM_THREADS"] = "1"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                env=environment, start_new_session=True,
            )  # fmt: skip

    def go(self, deadline: float) -> None:
        self.deadline = deadline
        order = {"limit_s": deadline - time.monotonic(), "skip": self.skip}
        with suppress(BrokenPipeError):  # it has ended already, and its exit status says why
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        try:
            return json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}

    def kill(self) -> None:
        """With all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Kills it after it has written where it was."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        self.kill()

    def failure(self) -> str | None:
        """Why it is to end now or has ended; empty where all is well, None while it runs."""
        code = self.process.poll()
        if code is not None:
            if code < 0:
                return f"killed by {signal.Signals(-code).name}"
            return "" if code == 0 else "failed" if code == 1 else f"exit status {code}"
        if time.monotonic() > self.deadline:
            self.stop()
            return "timed out"
        running = self.read().get("running")
        patience = self.arguments.patience_s
        if running and time.monotonic() - running["since"] > patience:
            self.stop()
            return f"no answer for {patience:.0f} s"
        return None

    def again(self, why: str) -> bool:
        """Begins once more without the attempt that ended the process; whether that is worth it."""
        data = self.read()
        running = data.get("running")
        left_s = self.deadline - time.monotonic()
        if running is None or self.tries == TRIES or left_s < LEAST_AGAIN_S:
            return False
        name = running["name"]
        self.skip.append(name)
        self.write_error(name, why)
        self.start()
        self.go(self.deadline)
        return True

    def write_error(self, name: str, why: str) -> None:
        """Unless the process has told of it."""
        data = self.read()
        data.pop("running", None)
        errors = data.setdefault("errors", {})
        errors.setdefault(name, f"{self.output_tail()}\n{why}")
        self.file.write_text(json.dumps(data))

    def output_tail(self, lines: int = 25) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])
