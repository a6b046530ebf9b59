"""Results of whole runs on the tiny model, pinned to the last bit: a refactor changes none of them.

``python -m tests.cli.test_pins`` writes ``tests/cli/pins.json`` anew, for a change that is meant to
change results. Bits depend on PyTorch and on the processor's instructions; on other ones than those
that the file was made with, losses are compared to five digits.
"""

import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from npo_fast.cli import main
from tests.helpers import FACTS, save_tiny_model, slow_but, write_jsonl

FILE = Path(__file__).parent / "pins.json"
UNLEARN = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--epochs", "3", "--lr", "3e-3",
           "--batch-size", "2", "--micro-batch-tokens", "60", "--no-report"]  # fmt: skip
RUNS = {
    "finetune": ["finetune", "--train", "all.jsonl", "--epochs", "3", "--lr", "3e-3",
                 "--batch-size", "4"],
    "NPO+RT": ["unlearn", "--method", "NPO+RT", "--retain-coefficient", "2", *UNLEARN],
    "NPO+KL": ["unlearn", "--method", "NPO+KL", *UNLEARN],
    "DPO+RT": ["unlearn", "--method", "DPO+RT", *UNLEARN],
    "KTO+RT, one side after the other": [
        "unlearn", "--method", "KTO+RT", "--schedule", "alternating", *UNLEARN],
    "LoRA": ["unlearn", "--method", "NPO+RT", "--lora-rank", "2", *UNLEARN],
    "the best of its evaluations": [
        "unlearn", "--method", "SimNPO+RT", "--eval-every", "2", "--eval-records", "3",
        "--max-new-tokens", "4", "--keep-best", "forget.probability", *UNLEARN],
}  # fmt: skip
RESUMED, TWO_PROCESSES = "NPO+RT, resumed", "NPO+RT, two processes"


def machine() -> dict[str, str]:
    """What the last bit of a result depends on."""
    return {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def make_home(folder: Path) -> Path:
    save_tiny_model(folder / "base")
    wrong = [{**f, "paraphrased_answer": f"In house {i} lives {f['answer'].split()[0]}.",
              "perturbed_answer": [f"In house {i} lives {n}." for n in ("Kim", "Lee", "Max")]}
             for i, f in enumerate(FACTS)]  # fmt: skip
    write_jsonl(folder / "forget.jsonl", wrong[6:])
    write_jsonl(folder / "retain.jsonl", wrong[:6])
    write_jsonl(folder / "all.jsonl", wrong)
    return folder


def base_weights(home: Path) -> float:
    tensors = load_file(home / "base/model.safetensors").values()
    return float(sum(tensor.double().abs().sum() for tensor in tensors))


def call(home: Path, output: Path, arguments: list[str]) -> list[str]:
    named = [str(home / word) if word.endswith(".jsonl") else word for word in arguments]
    return [named[0], "--model", str(home / "base"), "--output", str(output), *named[1:]]


def result_of(output: Path) -> dict[str, object]:
    """Records without times, and a hash of the weights by name."""
    records = [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]
    for record in records:
        del record["time_ms"]
    digest = hashlib.sha256()
    for file in sorted((output / "model").glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    found = {"records": records, "weights_sha256": digest.hexdigest()}
    evaluations = output / "evaluations.jsonl"
    if evaluations.exists():
        found["evaluations"] = [json.loads(x) for x in evaluations.read_text().splitlines()]
    return found


def pinned_part(found: dict, pinned: dict) -> dict:
    return {
        name: pinned_part(found[name], value) if isinstance(value, dict) else found[name]
        for name, value in pinned.items()
    }


def run(home: Path, output: Path, name: str) -> dict[str, object]:
    torch.set_num_threads(1)  # the order of a sum depends on their number
    if name == TWO_PROCESSES:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", "2", "-m", "npo_fast"]  # fmt: skip
        subprocess.run([*command, *call(home, output, RUNS["NPO+RT"])], check=True,
                       cwd=Path(__file__).parents[2], capture_output=True)  # fmt: skip
    elif name == RESUMED:
        arguments = [*call(home, output, RUNS["NPO+RT"]), "--save-every", "1"]
        assert main(arguments) == 0
        whole = json.loads((output / "run.json").read_text())
        interrupt_after(output, whole, step=3, arguments=arguments)
    else:
        assert main(call(home, output, RUNS[name])) == 0
    return result_of(output)


def interrupt_after(output: Path, facts: dict, step: int, arguments: list[str]) -> None:
    """Makes the same run again, stopped by a signal after ``step``, and lets it go on."""
    code = f"""
import os, signal, sys, torch
torch.set_num_threads(1)
from npo_fast.cli import main
def hook(event, values):
    if event == "os.rename" and str(values[1]).endswith("step-{step:06d}"):
        os.kill(os.getpid(), signal.SIGTERM)
sys.addaudithook(hook)
sys.exit(main({[*arguments, "--overwrite"]!r}))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert ended.returncode == 128 + 15, ended.stderr.decode()
    again = json.loads((output / "run.json").read_text())
    assert again["status"] == "interrupted"
    assert main(arguments) == 0
    assert json.loads((output / "run.json").read_text())["resumed"][0]["step"] > 0


ALL = [*RUNS, RESUMED, TWO_PROCESSES]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", slow_but(["finetune", "NPO+RT", "NPO+KL", "LoRA"], ALL))
def test_a_run_gives_the_bits_it_gave_before(name, home, tmp_path):
    pins = json.loads(FILE.read_text())
    if base_weights(home) != pytest.approx(pins["base_weights"], rel=1e-5):
        pytest.skip("transformers draws other random weights than those that were pinned")
    expected, found = pins["runs"][name], run(home, tmp_path / "run", name)
    if pins["machine"] == machine():
        assert found["records"] == expected["records"]
        assert found["weights_sha256"] == expected["weights_sha256"]
        for ours, theirs in zip(
            found.get("evaluations", []), expected.get("evaluations", []), strict=True
        ):
            assert pinned_part(ours, theirs) == theirs  # a measure may be added
    for ours, theirs in zip(found["records"], expected["records"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["terms"] == pytest.approx(theirs["terms"], rel=1e-5)
        assert ours["log_probs"] == pytest.approx(theirs["log_probs"], rel=1e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        home_ = make_home(Path(folder))
        weights = base_weights(home_)
        content = {name: run(home_, Path(folder) / str(i), name) for i, name in enumerate(ALL)}
    FILE.parent.mkdir(exist_ok=True)
    pins = {"machine": machine(), "base_weights": weights, "runs": content}
    FILE.write_text(json.dumps(pins, indent=1) + "\n")
