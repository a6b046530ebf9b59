"""Whether the GPU path is right and what it costs: one command, under eight minutes.

    python benchmarks/gpu.py --out DIR
    python benchmarks/gpu.py --out DIR --tiny --device cpu      # every line of it, on a CPU

Runs from a checkout, with torch, triton, transformers, numpy, scipy and pytest. Each part runs in
processes of its own under a time limit; what fails, hangs or crashes is recorded, and the rest goes
on. DIR/gpu.json has everything and is written again whenever there is something new; DIR/gpu.log is
the output of all processes; DIR/gpu.md has the tables.

    {"what": …, "argv": […], "commit": …, "nvidia_smi": …, "parts": {
      "2": {"title": …, "jobs": {"all": {"status": "done", "seconds": 41.0,
        "tables": {"N=4096 …": {"default": {"ms": …, "over_gemms": …}}},
        "errors": {"an attempt": "traceback"}}}}}}

An attempt that ends its process (a device assert, a segmentation fault, no answer for a while) is
noted, and the part begins once more without it.
"""

import argparse
import faulthandler
import importlib
import importlib.util
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_parts.process import Child  # noqa: E402
from gpu_parts.table import markdown  # noqa: E402

SHARES = 12  # of the tests, side by side
AHEAD = 2  # jobs whose processes import while others measure


@dataclass(frozen=True)
class Part:
    title: str
    module: str  # in gpu_parts
    limit_s: float  # of each job
    least_s: float  # with less time than this a job is not begun
    jobs: tuple[str, ...] = ("all",)
    interleave: bool = False
    quiet: bool = False  # the host's time counts: nothing else runs beside it


# the most valuable first
PARTS = {
    # its process may be the first on the machine that reads all these libraries
    0: Part("card, versions, rates", "card", 120, 10),
    2: Part("loss and gradients by every path", "loss", 120, 25),
    5: Part("peers", "peers", 45, 15, ("pytorch", "liger", "cce", "trl")),
    1: Part(
        "tests on the card", "pytests", 100, 25,
        tuple(f"{i}of{SHARES}" for i in range(SHARES)), interleave=True,
    ),
    3: Part("the third GEMM, and layouts of the logits", "gemms", 50, 12),
    6: Part("attention on a pack", "attention", 45, 12, quiet=True),
    7: Part("a training step of a Llama of 1B", "step", 90, 25, quiet=True),
    4: Part("configurations of the kernels", "sweep", 75, 15),
    9: Part("faults on purpose", "faults", 30, 0, ("crashes", "endless"), interleave=True),
}  # fmt: skip
ALL = [number for number in PARTS if number != 9]  # which is for the tests of this file
LIBRARIES = (
    "torch", "triton", "transformers", "numpy", "scipy", "pytest", "trl", "liger-kernel",
    "cut-cross-entropy", "flash-attn",
)  # fmt: skip
# a job of this name is left out where its package is not there
PACKAGES = {"liger": "liger_kernel", "cce": "cut_cross_entropy", "trl": "trl"}
TINY_JOBS = {1: ("0of1",)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for gpu.json, gpu.log and gpu.md")
    parser.add_argument("--tiny", action="store_true", help="sizes that take a CPU seconds")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--parts", type=int, nargs="+", default=ALL, choices=list(PARTS))
    parser.add_argument("--budget-s", type=float, default=470.0, help="for all parts together")
    parser.add_argument(
        "--patience-s", type=float, default=60.0, help="without an answer, for one attempt"
    )
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # PART:JOB, in a process of its own
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out is None and arguments.job is None:
        parser.error("--out is missing")
    if arguments.out is not None:
        arguments.out = arguments.out.resolve()  # processes begin in the checkout
    return arguments


Step = tuple[int, tuple[str, ...]]  # a part, and those of its jobs that run at the same time


class Suite:
    """All parts in turn, and the document that they fill."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.out = arguments, arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu.log").write_text("")
        self.started = time.monotonic()
        self.children: list[Child] = []
        self.waiting: list[Child] = []
        self.document: dict[str, Any] = {
            "what": f"npo_fast on {arguments.device}{', tiny' if arguments.tiny else ''}",
            "argv": sys.argv,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": arguments.commit or _commit(),
            "versions": _versions(),
            "nvidia_smi": _output(
                "nvidia-smi", "--format=csv,noheader",
                "--query-gpu=name,driver_version,power.limit,clocks.max.sm,memory.total",
            ),
            "seconds": 0.0,
            "parts": {},
        }  # fmt: skip

    def steps(self) -> list[Step]:
        """Jobs that run at the same time, one group after another."""
        found = []
        for number in self.arguments.parts:
            part = PARTS[number]
            jobs = TINY_JOBS.get(number, part.jobs) if self.arguments.tiny else part.jobs
            found += [(number, jobs)] if part.interleave else [(number, (job,)) for job in jobs]
        return found

    def run(self) -> None:
        steps = self.steps()
        for i, (number, jobs) in enumerate(steps):
            self.step(number, jobs, steps[i + 1 : i + 1 + AHEAD])
            self.write()

    def step(self, number: int, jobs: tuple[str, ...], following: list[Step]) -> None:
        part = PARTS[number]
        left_s = self.arguments.budget_s - (time.monotonic() - self.started)
        patient = 3 if self.arguments.tiny and number in ALL else 1  # a CPU may have other work
        limit_s = min(part.limit_s * patient, left_s)
        entry = self.document["parts"].setdefault(
            str(number), {"title": part.title, "limit_s": part.limit_s, "jobs": {}}
        )
        why = None
        if limit_s < max(part.least_s, 1):
            why = f"{left_s:.0f} s left of {self.arguments.budget_s:.0f}"
        elif not _importable(jobs[0]):
            why = f"{jobs[0]} is not installed"
        if why is not None:
            entry["jobs"] |= {job: {"status": f"left out: {why}"} for job in jobs}
            return
        children = [self.take(number, job) for job in jobs]
        started = time.monotonic()
        for child in children:
            child.go(started + limit_s)
        known = {(child.part, child.job) for child in self.waiting}
        for other, others in [] if part.quiet else following:
            if len(others) == 1 and (other, others[0]) not in known and _importable(others[0]):
                self.waiting.append(self.new(other, others[0]))
        self.watch(children, entry, started)

    def take(self, number: int, job: str) -> Child:
        """The child that waits for this, or a new one."""
        for child in self.waiting:
            if (child.part, child.job) == (number, job):
                self.waiting.remove(child)
                return child
        return self.new(number, job)

    def new(self, number: int, job: str) -> Child:
        self.children.append(Child(number, job, self.arguments))
        return self.children[-1]

    def watch(self, children: list[Child], entry: dict[str, Any], started: float) -> None:
        running, written = list(children), time.monotonic()
        while running:
            time.sleep(0.1)
            for child in list(running):
                why = child.failure()
                if why is None or (why and child.again(why)):
                    continue
                running.remove(child)
                status = "done" if why == "" else why
                if why:
                    child.write_error((child.read().get("running") or {"name": "all"})["name"], why)
                self.put(child, entry, status, started)
                self.end(child)
            if time.monotonic() - written > 2:
                for child in running:
                    self.put(child, entry, "running", started)
                self.write()
                written = time.monotonic()

    def put(self, child: Child, entry: dict[str, Any], status: str, started: float) -> None:
        data = child.read()
        entry["jobs"][child.job] = {
            "status": status,
            "seconds": round(time.monotonic() - started, 1),
            "begun": child.tries,
            "tables": data.get("tables", {}),
            "errors": data.get("errors", {}),
        }
        if status != "running":
            print(f"part {child.part} {child.job}: {status}", flush=True)

    def end(self, child: Child) -> None:
        """Its output goes into the log of all, and its files away."""
        child.kill()
        if child.process.stdin:
            child.process.stdin.close()
        if child.log.exists():
            with (self.out / "gpu.log").open("a") as log:
                log.write(f"\n==== part {child.part}, {child.job}\n")
                log.write(child.log.read_text(errors="replace"))
        for file in (child.log, child.file, child.file.with_suffix(".new")):
            file.unlink(missing_ok=True)
        self.children.remove(child)

    def write(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self.started, 1)
        new = self.out / "gpu.json.new"
        new.write_text(json.dumps(self.document, indent=1) + "\n")
        new.replace(self.out / "gpu.json")

    def close(self) -> None:
        for child in list(self.children):
            entry = self.document["parts"].get(str(child.part), {"jobs": {}})["jobs"]
            if entry.get(child.job, {}).get("status") == "running":
                entry[child.job]["status"] = "cut off"
            self.end(child)
        self.write()
        (self.out / "gpu.md").write_text(markdown(self.document))
        print(markdown(self.document, brief=True))

    @property
    def complete(self) -> bool:
        jobs = [job for part in self.document["parts"].values() for job in part["jobs"].values()]
        return all(job["status"].startswith(("done", "left out")) for job in jobs)


def _importable(job: str) -> bool:
    return job not in PACKAGES or importlib.util.find_spec(PACKAGES[job]) is not None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def _commit() -> str | None:
    inside = (ROOT / ".git").exists()
    return _output("git", "-C", str(ROOT), "rev-parse", "HEAD") if inside else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _end(*_: object) -> None:
    raise SystemExit("ended by a signal")


def run_suite(arguments: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _end)
    suite = Suite(arguments)
    try:
        suite.run()
    finally:
        suite.close()
    return 0 if suite.complete else 1


def run_job(arguments: argparse.Namespace) -> None:
    """In the child: imports, waits for the line that says how long and without what, measures."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    number, job = arguments.job.split(":")
    if arguments.device == "cpu":
        # before anything imports Triton or looks for a GPU
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    parent = os.dup(0)  # pytest puts another file in the place of standard input
    try:
        import torch
        from gpu_parts.record import Record

        module = importlib.import_module(f"gpu_parts.{PARTS[int(number)].module}")
        order = json.loads(_line(parent) or sys.exit("nobody waits for results"))
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no CUDA device")
        device = torch.device(arguments.device, *([0] if arguments.device == "cuda" else []))
        record = Record(arguments.json, device, order["limit_s"] - 1, order["skip"])
        module.run(record, device, arguments.tiny, job)
        record.finish()
    except Exception as error:
        traceback.print_exc()
        data = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        data.pop("running", None)
        data.setdefault("errors", {})["all"] = f"{type(error).__name__}: {error}"
        arguments.json.write_text(json.dumps(data))
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a GPU that hangs in its clean-up would spoil what is done


def _line(descriptor: int) -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        more = os.read(descriptor, 1)
        if not more:
            return b""
        text += more
    return text


def _end_with(descriptor: int) -> None:
    """Ends this process and its children when the parent is gone."""
    while os.read(descriptor, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    chosen = parse()
    if chosen.job is not None:
        run_job(chosen)
    sys.exit(run_suite(chosen))
