"""The headline at full size, in small: order, budget, and what is left when it is killed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from npo_fast.metrics import FORGET

pytestmark = pytest.mark.slow  # trains many models
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_tofu.py"
ABSENT = ("tyro", "datasets")  # on the machines that it is for
RUN = "import runpy, sys; sys.modules |= dict.fromkeys({absent}); sys.argv[0] = {script!r}; \
runpy.run_path({script!r}, run_name='__main__')"
ORDER = [
    ("original", ""),
    *[(method, f) for f in ("forget50", "forget10") for method in ("retrained", "NPO+RT", "GA+RT")],
    *[
        (method, f)
        for f in ("forget50", "forget10")
        for method in ("NPO", "SimNPO+RT", "DPO+RT", "IDK+RT", "GA")
    ],
]


@pytest.fixture(scope="module")
def gpu_tofu():
    spec = importlib.util.spec_from_file_location("gpu_tofu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_tofu"] = module  # dataclasses look there
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def start(out: Path, *flags: str, absent: tuple[str, ...] = ABSENT) -> subprocess.Popen:
    code = RUN.format(absent=absent, script=str(SCRIPT))
    command = [sys.executable, "-c", code, "--tiny", "--device", "cpu", "--out", str(out), *flags]
    out.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(out)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=out)


def read(out: Path) -> dict:
    return json.loads((out / "gpu_tofu.json").read_text(), parse_constant=pytest.fail)


def names(rows: list[dict]) -> list[tuple[str, str]]:
    """Each model once, in their order."""
    return list(dict.fromkeys((row["method"], row["forget"]) for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu_tofu") / "out"
    process = start(out, "--budget-s", "500")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return read(out), printed, out


def test_models_are_made_in_the_order_of_worth(finished):
    record, _, _ = finished
    assert record["finished"]
    assert not record["left_out"]
    assert names(record["models"]) == ORDER
    assert [m["lr"] for m in record["models"][:3]] == [1e-3, 2e-3, 4e-3]
    assert {m["lr"] for m in record["models"] if m["method"] == "retrained"} == {4e-3}


def test_every_model_has_its_numbers_and_what_they_cost(finished):
    record, _, _ = finished
    for model in record["models"]:
        assert {"model utility", "forget probability", "retain ROUGE-L"} <= model["numbers"].keys()
        assert ("forget quality" in model["numbers"]) == bool(model["forget"])
        assert min(model[name] for name in ("tokens", "tokens_per_s", "train_s", "evaluate_s")) > 0
        assert len(model["forget_truth_ratio"]) == record["records"][FORGET]
    methods = [m for m in record["models"] if m["method"] not in ("original", "retrained")]
    assert all([look["epoch"] for look in m["course"]] == [1] for m in methods)
    kept = {m["forget"]: m["terms"].get("retain NLL") for m in methods if m["method"] == "NPO+RT"}
    assert kept == {"forget50": 5.0, "forget10": 1.0}


def test_the_record_names_the_machine_and_the_table_is_printed(finished):
    record, printed, out = finished
    assert {"device", "torch", "transformers"} <= record["versions"].keys()
    assert set(record["attention_ms"]) == {"npo_fast_packed", "sdpa"}
    table = (out / "gpu_tofu.md").read_text()
    assert table in printed
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(record["models"])


def test_a_budget_of_nothing_leaves_all_out_with_reasons(tmp_path):
    process = start(tmp_path / "out", "--budget-s", "0")
    process.communicate(timeout=120)
    record = read(tmp_path / "out")
    assert process.returncode == 0
    assert record["models"] == []
    assert names(record["left_out"]) == ORDER
    assert all(one["reason"] for one in record["left_out"])


def test_a_kill_leaves_what_was_done_and_rouge_is_not_needed(tmp_path):
    out = tmp_path / "out"
    process = start(out, absent=(*ABSENT, "rouge_score"))
    file = out / "gpu_tofu.json"
    deadline = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    record = read(out)
    assert not record["finished"]
    assert names(record["models"])[0] == ORDER[0]
    assert "not installed" in record["rouge"]
    assert "model utility" not in record["models"][0]["numbers"]
    assert "forget probability" in record["models"][0]["numbers"]


@pytest.fixture
def experiment(gpu_tofu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_tofu", "--tiny", "--out", str(tmp_path)])
    options = gpu_tofu.read_options()
    tokenizer = gpu_tofu.train_tokenizer(gpu_tofu.write_tiny_tofu(tmp_path, 0))
    lm = gpu_tofu.new_model(tokenizer, 0)
    made = gpu_tofu.Experiment(options, lm, tokenizer, str(tmp_path), time.monotonic() + 100)
    made.taught = made.pretrained
    made.results = {name: {} for name in ("", "forget50", "forget10")}
    return made


def test_what_does_not_fit_is_left_out_and_what_is_smaller_still_made(gpu_tofu, experiment):
    large, small = (gpu_tofu.Job("NPO+RT", forget, 1e-4) for forget in ("forget50", "forget10"))
    steps, passes, _ = experiment._size(large)
    assert experiment._no_room(large) is None  # nothing is known yet
    experiment.pass_s = 101 / (steps * passes)
    assert "left" in experiment._no_room(large)
    assert experiment._no_room(small) is None
    del experiment.results["forget10"]
    assert "retrained" in experiment._no_room(small)


def test_time_that_ends_within_a_model_ends_the_model(gpu_tofu, experiment):
    experiment.training_attention = "auto"
    experiment.evaluate_s = 200.0
    with pytest.raises(gpu_tofu.BudgetSpentError, match="at step 1 of"):
        experiment._model(gpu_tofu.Job("original", lr=1e-3))


def test_a_wrong_learning_rate_is_corrected_once(gpu_tofu):
    retrained = {FORGET: {"avg_gt_loss": [1.0, 1.0]}}
    job = gpu_tofu.Job("NPO+RT", "forget50", 3e-5)

    def lr(quality: float, probability: float) -> float | None:
        numbers = {"forget quality": quality, "forget probability": probability}
        again = gpu_tofu.once_more(job, numbers, retrained, 0.9)
        return again and again.lr

    assert lr(0.06, 0.9) is None
    assert lr(0.01, 0.9) == pytest.approx(9e-5)
    assert lr(0.01, 0.1) == pytest.approx(1e-5)
    job = gpu_tofu.Job("NPO+RT", "forget50", 3e-5, attempt=2)
    assert lr(0.01, 0.9) is None
    job = gpu_tofu.Job("original", lr=1e-3)
    assert lr(0, 0.5) == 2e-3
    assert lr(0, 0.95) is None


def test_a_file_in_parts_is_read_as_one(gpu_tofu, tmp_path):
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, content in zip(parts, (b"GGUF", b"rest"), strict=True):
        part.write_bytes(content)
    with gpu_tofu.whole_file(parts) as whole:
        assert whole.suffix == ".gguf"
        assert whole.read_bytes() == b"GGUFrest"
    assert not whole.exists()
