"""``benchmarks/gpu.py`` runs once, on a machine that is lent: every line of it runs here first."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # the whole command, in processes of its own
ROOT = Path(__file__).parents[2]
# what a machine with a GPU may lack
ABSENT = ("tyro", "datasets", "rouge_score", "bitsandbytes", "matplotlib")
# what a CPU, or the PyTorch or the packages at hand, may lack
EXCUSED = ("addmm", "mm + add_", "varlen", "torch-lce", "tests/kernels/test_gpu.py")


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    """In an environment in which what may be absent cannot be imported."""
    blocked = out.parent / "blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
    )
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--tiny", "--device", "cpu",
         "--out", str(out), *arguments],
        env={**os.environ, "PYTHONPATH": str(blocked)}, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip


def read(out: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((out / "gpu.json").read_text(), parse_constant=refuse)


def tables(document: dict[str, Any], part: int) -> dict[str, Any]:
    return {k: v for job in document["parts"][str(part)]["jobs"].values()
            for k, v in job.get("tables", {}).items()}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All parts."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = run(out, "--commit", "abc123", "--budget-s", "800", "--patience-s", "200")
    assert done.returncode == 0, done.stdout + done.stderr + (out / "gpu.log").read_text()
    return out, read(out)


def test_every_part_ends_well_without_what_a_gpu_machine_may_lack(whole):
    _, document = whole
    assert list(document["parts"]) == ["0", "2", "5", "1", "3", "6", "7", "4"]
    for number, part in document["parts"].items():
        for name, job in part["jobs"].items():
            if name in ("liger", "cce", "trl") and job["status"].startswith("left out"):
                continue
            assert job["status"] == "done", (number, name, job)
            errors = {k: v for k, v in job["errors"].items() if not any(x in k for x in EXCUSED)}
            errors = {k: v for k, v in errors.items() if "datasets halted" not in str(v)}  # TRL
            assert not errors, (number, name, errors)
            assert job["begun"] == 1


def test_what_is_timed_is_right_and_stands_beside_the_gemms(whole):
    _, document = whole
    found = tables(document, 2)
    shapes = [rows for name, rows in found.items() if name.startswith("N=")]
    assert len(shapes) >= 4
    for rows in shapes:
        for path in ("default", "no logits", "chunks of 1024"):
            row = rows[path]
            assert 0 < row["ms"] < 1e5
            assert row["over_gemms"] > 0
            assert max(row["error_loss"], row["error_hidden"], row["error_weight"]) < 5e-2
        assert rows["three GEMMs"]["over_gemms"] == rows["two GEMMs"]["over_gemms"] == 1
        assert rows["frozen head"]["error_hidden"] < 5e-2
        assert rows["default, forward alone"]["ms"] > 0
    (kl,) = (rows for name, rows in found.items() if name.startswith("linear_kl"))
    assert kl["default"]["error_weight"] < 5e-2


def test_each_part_has_its_tables(whole):
    _, document = whole
    assert len(tables(document, 0)["rates"]) == 5
    assert sum(row.get("passed", 0) for row in tables(document, 1)["tests"].values()) > 0
    assert any("bf16" in rows for rows in tables(document, 3).values())
    assert all("default" in r for k, r in tables(document, 4).items() if k.startswith("row"))
    assert "plain NPO" in next(iter(tables(document, 5).values()))
    assert all("npo_fast_packed" in rows for rows in tables(document, 6).values())
    steps = tables(document, 7)["step"]
    assert steps["padded"]["over_ours"] > 0
    assert steps["padded"]["loss_difference"] == 0
    assert len(tables(document, 7)["profile"]) > 10


def test_the_run_leaves_json_tables_and_log(whole):
    out, document = whole
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]
    text = (out / "gpu.md").read_text()
    assert all(f"## {number} " in text for number in document["parts"])
    assert document["commit"] == "abc123" in text
    assert document["versions"]["torch"] in text


def test_a_part_that_raises_crashes_or_hangs_keeps_what_it_has_and_goes_on(tmp_path):
    out = tmp_path / "out"
    done = run(out, "--parts", "9", "--patience-s", "4")
    assert done.returncode == 1, done.stdout + done.stderr
    jobs = read(out)["parts"]["9"]["jobs"]
    errors = jobs["crashes"]["errors"]
    assert jobs["crashes"]["status"] == "failed"
    assert jobs["crashes"]["begun"] == 3
    assert jobs["crashes"]["tables"]["rows"].keys() == {"before", "after"}
    assert "IndexError" in errors["raises"]
    assert errors["crashes"].endswith("killed by SIGSEGV")
    assert errors["hangs"].endswith("no answer for 4 s")
    assert "faults.py" in errors["hangs"], "where it hung"
    assert errors["all"] == "RuntimeError: outside of any attempt"
    assert jobs["endless"]["status"] == "timed out"
    assert jobs["endless"]["tables"]["rows"].keys() == {"endless"}
    assert "all: RuntimeError" in (out / "gpu.md").read_text()


def test_parts_for_which_no_time_is_left_say_so(tmp_path):
    out = tmp_path / "out"
    assert run(out, "--parts", "2", "3", "--budget-s", "1").returncode == 0
    parts = read(out)["parts"]
    assert all(p["jobs"]["all"]["status"].startswith("left out: ") for p in parts.values())
