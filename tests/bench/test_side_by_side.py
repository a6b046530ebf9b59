"""Many runs beside each other: their order, their results, and what a failure leaves."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
TOOL = """
import json, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
time.sleep(float(flags.get("--sleep", 0)))
if "--fail" in flags:
    sys.exit(3)
file = pathlib.Path(flags["--result"])
known = json.loads(file.read_text()) if file.exists() else {"seeds": {}}
known["seeds"][flags["--seed"]] = {"began_with": sorted(known["seeds"])}
file.write_text(json.dumps(known))
"""


@pytest.fixture(scope="module")
def side_by_side():
    spec = importlib.util.spec_from_file_location("side_by_side", FOLDER / "side_by_side.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["side_by_side"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(side_by_side, tmp_path, monkeypatch):
    """Runs jobs of a small script; returns the merged results."""
    (tmp_path / "tool.py").write_text(TOOL)
    monkeypatch.setattr(side_by_side, "HERE", tmp_path)
    (tmp_path / "out").mkdir()

    def jobs_of(jobs, budget_s=30.0):
        pool = side_by_side.Pool(tmp_path / "out", tmp_path / "runs", 2, {})
        pool.run(jobs, time.monotonic() + budget_s)
        file = tmp_path / "out" / "all.json"
        return json.loads(file.read_text())["seeds"] if file.exists() else {}

    return jobs_of


def test_a_job_waits_for_what_it_needs_and_begins_with_its_results(side_by_side, run):
    first = side_by_side.Job("tool", "first", ["--seed", "0", "--sleep", "0.5"], result="all.json")
    second = side_by_side.Job("tool", "second", ["--seed", "1"], [first], "all.json")
    alone = side_by_side.Job("tool", "alone", ["--seed", "2"], result="all.json")
    assert run([second, first, alone]) == {
        "0": {"began_with": []}, "1": {"began_with": ["0"]}, "2": {"began_with": []}
    }  # fmt: skip


def test_a_failure_ends_only_what_needs_it(side_by_side, run):
    broken = side_by_side.Job("tool", "broken", ["--fail", "1"])
    lost = side_by_side.Job("tool", "lost", ["--seed", "0"], [broken], "all.json")
    sound = side_by_side.Job("tool", "sound", ["--seed", "1"], result="all.json")
    assert set(run([broken, lost, sound])) == {"1"}


def test_what_is_done_by_the_end_of_the_time_is_kept(side_by_side, run):
    quick = side_by_side.Job("tool", "quick", ["--seed", "0"], result="all.json")
    slow = side_by_side.Job("tool", "slow", ["--seed", "1", "--sleep", "60"], result="all.json")
    assert set(run([quick, slow], budget_s=3.0)) == {"0"}
    assert slow.process.wait() != 0


def test_every_job_of_the_plan_has_its_script_and_the_models_it_needs(side_by_side, tmp_path):
    jobs = list(side_by_side.plan(tmp_path, "tofu", [0, 1, 2]))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) == 6 + 3 * (7 + 6 + 4)
    assert all((FOLDER / f"{job.script}.py").exists() for job in jobs)
    assert all(jobs.index(need) < jobs.index(job) for job in jobs for need in job.needs)


def test_answers_of_the_same_questions_are_merged_row_by_row(side_by_side):
    known = {"answers": [{"question": "q", "a": "1"}], "tried": {"a": 1}}
    side_by_side.merge(known, {"answers": [{"question": "q", "b": "2"}], "tried": {"b": 2}})
    assert known == {"answers": [{"question": "q", "a": "1", "b": "2"}], "tried": {"a": 1, "b": 2}}
