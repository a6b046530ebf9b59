"""A run that was killed, interrupted or out of memory goes on as if nothing had happened."""

import dataclasses
import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from npo_fast.cli import main
from npo_fast.errors import NonFiniteError, OutOfMemory, PartialUpdateOutOfMemory
from npo_fast.experiments.demo.tiny_model import train_tokenizer
from npo_fast.methods import build_method
from npo_fast.model.adapters import read_weights
from npo_fast.model.causal_lm import CausalLM
from npo_fast.runs.saved_model import save_model
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs, train
from npo_fast.trainer.optimizers import build_optimizer
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.state import DamagedError, TrainState, save_tensors
from tests.helpers import (
    FACTS,
    dropout_lm,
    limit_memory,
    metadata_of,
    read_jsonl,
    slow_but,
    sources,
    tiny_model,
    write_jsonl,
)

SERVER = multiprocessing.get_context("forkserver")  # imports once, then forks: a process is cheap
SERVER.set_forkserver_preload(
    ["npo_fast.cli.unlearn", "npo_fast.model.load", "npo_fast.trainer.loop",
     "tests.trainer.test_resume",
     "transformers.models.gpt2.modeling_gpt2", "npo_fast.evaluation.evaluate"]
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model with dropout, two data sets, and a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("home")
    texts = [f"Question: {fact['question']}\nAnswer: {fact['answer']}" for fact in FACTS]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(0)
    model = tiny_model("GPT2", vocab_size=len(tokenizer), eos_token_id=0)
    assert model.config.resid_pdrop > 0
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_jsonl(folder / "forget.jsonl", FACTS[6:])
    write_jsonl(folder / "retain.jsonl", FACTS[:6])
    assert start(home=folder, output=folder / "whole") == 0
    return folder


def arguments(home: Path, output: Path, *more: str) -> list[str]:
    """Ten steps that need everything a run can need: references, KL, dropout, evaluations."""
    return ["unlearn", "--model", str(home / "base"), "--forget", str(home / "forget.jsonl"),
            "--retain", str(home / "retain.jsonl"), "--output", str(output), "--method", "NPO+KL",
            "--epochs", "5", "--lr", "3e-3", "--batch-size", "2", "--max-new-tokens", "3",
            "--report-records", "1", "--micro-batch-tokens", "40", "--save-every", "2",
            "--eval-every", "3", "--eval-records", "2", "--keep-best", "forget.probability",
            *more]  # fmt: skip


def _process(arguments: list[str], log: Path, at: tuple | None) -> None:
    """``main`` in a process that signals itself when it does a thing for the nth time."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    torch.set_num_threads(1)
    if at is not None:
        event, ending, nth, numbers = at
        seen = []

        def hook(name: str, values: tuple) -> None:
            if name == event and str(values[0]).endswith(ending):
                seen.append(name)
                if len(seen) == nth:
                    for number in numbers:
                        os.kill(os.getpid(), number)

        sys.addaudithook(hook)
    os._exit(main(arguments))


def start(home: Path, output: Path, *more: str, at: tuple | None = None) -> int:
    """The exit code of ``npo-fast unlearn``; minus the signal where one killed it."""
    log = output.with_name(output.name + ".log")
    process = SERVER.Process(target=_process, args=(arguments(home, output, *more), log, at))
    process.start()
    process.join(timeout=120)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"it hangs: {log.read_text()}")
    return process.exitcode


def log_of(output: Path) -> str:
    return output.with_name(output.name + ".log").read_text()


def steps_of(output: Path) -> list[dict]:
    return [{**line, "time_ms": 0} for line in read_jsonl(output / "steps.jsonl")]


def assert_same_run(one: Path, other: Path) -> None:
    """Every number and every weight, to the bit."""
    assert steps_of(one) == steps_of(other)
    assert [step["step"] for step in steps_of(one)] == list(range(1, 11))
    assert read_jsonl(one / "evaluations.jsonl") == read_jsonl(other / "evaluations.jsonl")
    a, b = metadata_of(one), metadata_of(other)
    for name in ("status", "best", "before", "after"):
        assert a[name] == b[name], name
    assert a["status"] == "finished"
    for weights in ("model", "checkpoints/best"):
        file = f"{weights}/model.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes()


KILL = (signal.SIGKILL,)
# (what it does, to a path that ends so, for the nth time), and the step the next one goes on from
MOMENTS = {
    "before the run is in its folder": ("os.rename", "run.json.partial", 1, None),
    "before the first checkpoint": ("os.mkdir", "step-000002.partial", 1, None),
    "while a checkpoint is written": ("open", "step-000002.partial/tokenizer_config.json", 1, None),
    "before the manifest of a checkpoint": ("open", "step-000004.partial/manifest.json", 1, 2),
    "before a checkpoint gets its name": ("os.rename", "step-000004.partial", 1, 2),
    "while an evaluation is written": ("open", "evaluations.jsonl", 3, 2),
    "before the older checkpoint goes": ("shutil.rmtree", "step-000002.old", 1, 4),
    "between two names of the best model": ("os.rename", "best.partial", 1, 4),
    "while the final model is written": ("open", "model.partial/config.json", 1, 8),
    "after the final report": ("os.rename", "run.json.partial", 3, 10),
}


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(home, tmp_path):
    output = tmp_path / "run"
    for moment, (event, ending, nth, _) in MOMENTS.items():
        assert start(home, output, at=(event, ending, nth, KILL)) == -signal.SIGKILL, moment
    assert start(home, output) == 0
    assert_same_run(output, home / "whole")
    assert [r["step"] for r in metadata_of(output)["resumed"]] == [
        step for *_, step in MOMENTS.values() if step is not None
    ]
    log = log_of(output)
    assert "ended without a checkpoint: it starts again at step 0" in log
    assert "was trained already" in log
    assert not list(output.rglob("*.partial")) + list(output.rglob("*.old"))
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["best", "step-000008"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_goes_on(home, tmp_path, number):
    output = tmp_path / "run"
    at = ("open", "evaluations.jsonl", 2, (number,))  # the second look, after step 3
    assert start(home, output, "--save-every", "0", at=at) == 128 + number
    assert metadata_of(output)["status"] == "interrupted"
    assert len(read_jsonl(output / "steps.jsonl")) == 3
    assert "interrupted after step 3 of 10; the same command goes on" in log_of(output)
    assert start(home, output, "--save-every", "0") == 0
    assert "after step 3" in log_of(output)
    assert_same_run(output, home / "whole")


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(home, tmp_path):
    at = ("open", "evaluations.jsonl", 2, (signal.SIGTERM, signal.SIGTERM))
    assert start(home, tmp_path / "run", at=at) == -signal.SIGTERM
    assert not (tmp_path / "run/checkpoints/step-000003").exists()


@pytest.fixture(scope="module")
def unfinished(home):
    """A run that was killed while it had two complete checkpoints, 2 and 4."""
    output = home / "unfinished"
    at = ("os.rename", "step-000002", 1, KILL)
    assert start(home, output, at=at) == -signal.SIGKILL
    return output


@pytest.fixture
def killed(unfinished, tmp_path):
    return shutil.copytree(unfinished, tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["state.pt", "model.safetensors"])
def test_a_damaged_checkpoint_is_left_for_the_one_before(home, killed, file):
    damaged = killed / "checkpoints/step-000004" / file
    damaged.write_bytes(damaged.read_bytes()[:500])
    assert start(home, killed) == 0
    assert "ignored, for it is damaged" in log_of(killed)
    assert "after step 2" in log_of(killed)
    assert_same_run(killed, home / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["state.pt", "model.safetensors", "steps.jsonl"])
def test_checkpoints_that_are_all_damaged_are_not_thrown_away(home, killed, file, capsys):
    damaged = [killed / file] if file == "steps.jsonl" else [*killed.glob(f"checkpoints/*/{file}")]
    for one in damaged:
        one.write_bytes(one.read_bytes()[: 500 if file != "steps.jsonl" else 0])
    assert main(arguments(home, killed)) == 2
    error = capsys.readouterr().err
    assert "no checkpoint in" in error
    assert "add --overwrite to begin anew" in error
    assert len(list((killed / "checkpoints").glob("step-*[0-9]"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("lost", [True, False])
def test_lost_log_probs_of_the_reference_are_computed_again(home, killed, lost):
    references = killed / "references.pt"
    references.unlink() if lost else references.write_bytes(references.read_bytes()[:100])
    assert start(home, killed) == 0, log_of(killed)
    assert "after step 4" in log_of(killed)
    assert_same_run(killed, home / "whole")


FILL = """
import pathlib, resource, sys, torch
from npo_fast.errors import UserError
from npo_fast.model.save import save_folder
from npo_fast.trainer.state import save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    save_folder(
        pathlib.Path(sys.argv[1]),
        lambda folder: save_tensors({"a": torch.zeros(1 << 20)}, folder / "state.pt"),
    )
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_midway_is_reported(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        save_tensors({"a": torch.zeros(9)}, Path("/dev/full"))
    command = [sys.executable, "-c", FILL, str(tmp_path / "step-000001")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "step-000001: [Errno 27] File too large; nothing was written" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_output_folder_that_holds_the_model_is_refused(home, capsys):
    base = home / "base"
    before = sorted(path.name for path in base.iterdir())
    assert main([*arguments(home, base), "--overwrite"]) == 2
    assert "holds the --model itself" in capsys.readouterr().err
    assert sorted(path.name for path in base.iterdir()) == before


@pytest.mark.slow
def test_a_run_resumes_with_settings_that_need_less_memory(home, tmp_path):
    output = tmp_path / "run"
    killed = ("os.rename", "step-000006.partial", 1, KILL)
    assert start(home, output, at=killed) == -signal.SIGKILL
    less = ("--micro-batch-tokens", "20", "--gradient-checkpointing")
    assert start(home, output, *less) == 0, log_of(output)
    assert [step["micro_batch_tokens"] for step in steps_of(output)] == [40] * 4 + [20] * 6


@pytest.mark.slow
def test_a_run_with_other_settings_or_data_is_not_resumed(home, killed, capsys):
    before = (killed / "steps.jsonl").read_bytes()
    write_jsonl(killed.parent / "forget.jsonl", [{**fact, "answer": "No."} for fact in FACTS[6:]])
    changes = {
        ("--lr", "1e-3"): "lr is 0.003 there and 0.001 here",
        ("--loss-on", "all"): "loss_on is 'last' there and 'all' here",
        ("--method", "NPO"): "method is 'NPO+KL' there and 'NPO' here",
        ("--seed", "1", "--epochs", "6"): "epochs is 5 there and 6 here; seed is 0 there and 1",
        ("--forget", str(killed.parent / "forget.jsonl")): "data forget has changed",
    }
    for more, message in changes.items():
        assert main(arguments(home, killed, *more)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "add --overwrite to begin anew" in error
    assert (killed / "steps.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_reference_that_was_replaced_is_noticed(home, killed, tmp_path, capsys):
    """KL compares with hidden states that are made again from the model as it was."""
    shutil.copytree(home / "base", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(home / "base")
    try:
        assert main(arguments(home, killed)) == 2
    finally:
        shutil.copytree(tmp_path / "base", home / "base", dirs_exist_ok=True)
    assert "the reference's model differs" in capsys.readouterr().err


@pytest.mark.slow
def test_overwrite_begins_anew_and_a_finished_run_is_refused(home, killed, capsys):
    assert main(arguments(home, killed, "--overwrite", "--epochs", "1")) == 0
    assert len(read_jsonl(killed / "steps.jsonl")) == 2
    assert "resumed" not in metadata_of(killed)
    assert main(arguments(home, killed, "--epochs", "1")) == 2
    assert "is finished, with its model in" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_do_not_write_to_one_run(home, killed, capsys):
    with (killed / "steps.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for more in ([], ["--overwrite"]):
            assert main(arguments(home, killed, *more)) == 2
            assert "another process writes to the run" in capsys.readouterr().err
    assert (killed / "checkpoints/step-000004").is_dir()


# the loop itself


def steps_for(lm, settings, state=None, method="NPO+RT"):
    terms = build_method(method)
    first = dropout_lm(lm.dtype)  # the model as it was
    references = reference_log_probs(first, sources(), terms, 2048)
    cache = reference_cache_for(terms, first, sources(), 2048)
    return train(lm, sources(), terms, settings, references, cache, state)


class Tokenless:
    def save_pretrained(self, folder: Path) -> None:
        pass


@pytest.mark.parametrize(
    ("method", "schedule", "dtype"),
    [
        ("KTO+RT", "summed", torch.bfloat16),
        pytest.param("NPO+RT", "alternating", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_weights_and_state_of_a_checkpoint_are_exact(tmp_path, method, schedule, dtype):
    settings = TrainSettings(epochs=3, batch_size=4, lr=1e-2, schedule=schedule)
    whole = dropout_lm(dtype)
    expected = [record.loss for record in steps_for(whole, settings, method=method)]
    one, state, losses = dropout_lm(dtype), TrainState(), []
    for record in steps_for(one, settings, state, method):
        losses.append(record.loss)
        if record.step == 3:
            save_model(one, Tokenless(), tmp_path / "step", state.writer())
            break
    torch.manual_seed(77)
    other = dropout_lm(dtype)
    read_weights(other, tmp_path / "step")
    torch.rand(5)
    rest = steps_for(other, settings, TrainState.load(tmp_path / "step"), method)
    assert losses + [record.loss for record in rest] == expected
    for p, q in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert p.dtype == dtype
        assert torch.equal(p, q)


def test_a_state_of_another_format_is_damaged(tmp_path):
    torch.save({"format": 0}, tmp_path / "state.pt")
    with pytest.raises(DamagedError, match="has the format 0, not 2"):
        TrainState.load(tmp_path)


def test_a_non_finite_step_after_a_resume_leaves_the_weights(tmp_path):
    settings = TrainSettings(epochs=3, batch_size=7, lr=1e-3)
    lm, state = dropout_lm(), TrainState()
    next(steps_for(lm, settings, state))
    state.writer()(tmp_path)
    good = {name: p.clone() for name, p in lm.model.named_parameters()}
    steps = steps_for(lm, settings, TrainState.load(tmp_path))

    def poison(module, args, out):
        out.last_hidden_state = out.last_hidden_state * torch.nan
        return out

    lm.decoder.register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match=r"step 2: .*the weights stay those of step 1"):
        next(steps)
    assert all(torch.equal(good[n], p) for n, p in lm.model.named_parameters())


@pytest.mark.parametrize(
    "error", slow_but([RuntimeError], [torch.OutOfMemoryError, RuntimeError, MemoryError])
)
def test_out_of_memory_makes_the_step_of_smaller_micro_batches(error):
    """Also where it strikes after the gradients of some micro-batches: the step starts again."""
    settings = TrainSettings(epochs=2, batch_size=7, lr=1e-3, micro_batch_tokens=44)
    lm = dropout_lm()
    tried = limit_memory(lm, 42, error)
    found = list(steps_for(lm, settings))
    assert tried[0] <= 42 < max(tried), "memory ran out, and not at once"
    assert {record.micro_batch_tokens for record in found} == {22}
    small = dropout_lm()
    expected = list(steps_for(small, dataclasses.replace(settings, micro_batch_tokens=22)))
    strip = [dataclasses.replace(record, time_ms=0.0) for record in found]
    assert strip == [dataclasses.replace(record, time_ms=0.0) for record in expected]
    for p, q in zip(lm.model.parameters(), small.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_one_sequence_that_does_not_fit_is_an_error_with_cures():
    lm = dropout_lm()
    good = {name: p.clone() for name, p in lm.model.named_parameters()}
    limit_memory(lm, 5)
    with pytest.raises(OutOfMemory, match=r"step 1: out of memory with one sequence.*max_length"):
        next(steps_for(lm, TrainSettings(epochs=1, batch_size=7)))
    assert all(p.grad is None for p in lm.model.parameters())
    assert all(torch.equal(good[n], p) for n, p in lm.model.named_parameters())


def test_out_of_memory_in_the_backward_of_a_whole_step_leaves_the_weights(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("of activations")

    lm = dropout_lm()
    good = {name: p.clone() for name, p in lm.model.named_parameters()}
    steps = steps_for(lm, TrainSettings(epochs=1, batch_size=7, step_in_backward=True))
    monkeypatch.setattr(torch.Tensor, "backward", fail)
    with pytest.raises(OutOfMemory, match="in the backward .*add gradient_checkpointing") as found:
        next(steps)
    assert not isinstance(found.value, PartialUpdateOutOfMemory)
    assert all(torch.equal(good[n], p) for n, p in lm.model.named_parameters())


@pytest.mark.parametrize("in_backward", [False, True])
def test_out_of_memory_in_the_optimizer_is_an_error_with_remedies(in_backward, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("of states")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    settings = TrainSettings(epochs=1, batch_size=7, step_in_backward=in_backward)
    with pytest.raises(
        PartialUpdateOutOfMemory, match=r"step 1: out of memory in the optimizer's step"
    ):
        next(steps_for(dropout_lm(), settings))


def test_errors_other_than_out_of_memory_pass_through():
    lm = dropout_lm()

    def fail(module, args):
        raise RuntimeError("shapes do not match")

    lm.decoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        next(steps_for(lm, TrainSettings(epochs=1, batch_size=7)))


@pytest.mark.slow
def test_a_new_process_reads_8_bit_states(tmp_path):
    lm = CausalLM(tiny_model("Llama", hidden_size=64, intermediate_size=64))
    optimizer = build_optimizer(lm.model, "adamw-8bit", 1e-3, 0.0)
    for parameter in lm.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = TrainState(1)
    state.attach(lm, optimizer=optimizer)
    state.writer()(tmp_path)
    code = (
        "import sys, pathlib; from npo_fast.trainer.optimizers import check_optimizer; "
        "from npo_fast.trainer.state import TrainState; check_optimizer('adamw-8bit'); "
        "print(TrainState.load(pathlib.Path(sys.argv[1])).step)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["1"], done.stderr
