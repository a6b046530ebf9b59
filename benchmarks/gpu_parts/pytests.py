"""Part 1: the tests of the GPU kernels, on the card, a share of them in each of several processes.

Most of the time goes into compiling kernels, so the shares run side by side. A test that breaks
the GPU's context or the process counts as failed; the next process goes on with those after it.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers  # noqa: F401  (the tests need it: imported while others measure)

from gpu_parts.record import ERROR_LINES, Record

FILES = ("test_kernels_triton.py", "test_kernels_triton_linear.py", "test_gpu.py")
# enough to run every line of this part on a CPU, within seconds
TINY = "no_rows or npo_value"
NO_TESTS = pytest.ExitCode.NO_TESTS_COLLECTED  # in this share of them
ROOT = Path(__file__).parents[2]


class Shard:
    """A pytest plugin that takes one share of the tests and records each as it ends."""

    def __init__(self, record: Record, share: int, shares: int) -> None:
        self.record, self.share, self.shares = record, share, shares
        self.done: list[str] = record.data.setdefault("done", [])  # of an earlier process

    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[Any]) -> None:
        self.session = session
        gone = {*self.done, *self.record.skip}
        items[:] = [one for one in items[self.share :: self.shares] if one.nodeid not in gone]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed(report.nodeid, report.longreprtext)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.record.begin(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed(report.nodeid, report.longreprtext)
        if report.skipped and isinstance(report.longrepr, tuple):
            self.count("skipped", report.nodeid)
            self.count_in("skipped because", str(report.longrepr[2])[:120], "tests")
        if report.when == "call" and report.passed:
            self.count("passed", report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.done.append(nodeid)
        self.record.finish()
        if self.record.left_s < 0:
            self.session.shouldstop = "no time left"

    def failed(self, nodeid: str, text: str) -> None:
        self.count("failed", nodeid)
        self.record.error(nodeid, "\n".join(text.splitlines()[:ERROR_LINES]))
        self.record.end_if_broken()

    def count(self, outcome: str, nodeid: str) -> None:
        self.count_in("tests", nodeid.partition("::")[0], outcome)

    def count_in(self, table: str, name: str, key: str) -> None:
        row = self.record.data["tables"].get(table, {}).get(name, {})
        self.record.row(table, name, **{key: row.get(key, 0) + 1})


def run(record: Record, device: torch.device, tiny: bool, job: str) -> None:
    share, shares = (int(part) for part in job.split("of"))
    os.chdir(ROOT)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    files = [f"tests/kernels/{name}" for name in FILES]
    for file in files:
        if not Path(file).exists():
            record.error(file, "not there")
    arguments = [file for file in files if Path(file).exists()]
    arguments += ["-q", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if tiny:
        arguments += ["-k", TINY]
    code = pytest.main(arguments, plugins=[Shard(record, share, shares)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, NO_TESTS):
        record.error(f"pytest {job}", f"exit status {code}")
