"""One of several processes hangs, dies or fails: the others name it and end; the run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from npo_fast.runs.options import RunOptions
from npo_fast.watch import limits
from npo_fast.watch.verdict import (
    BEREFT,
    FAILED,
    LEFT,
    Process,
    Record,
    machine_name,
    verdict,
)
from tests.helpers import FACTS, metadata_of, read_jsonl, save_tiny_model, write_jsonl

ROOT = Path(__file__).parents[2]
WAITS = Record(beat=40, machine="m", calls=7, collective="all_gather", place="step 12")
COMPUTES = replace(WAITS, calls=6, collective=None, frame="mine.py:3 in look")


def processes(*records: Record, still_s: float = 0.0) -> list[Process]:
    return [Process(i, record, still_s=still_s) for i, record in enumerate(records)]


# --- the verdict on what was read -----------------------------------------------------------------


def test_a_silent_process_is_named_with_the_collective_in_which_the_others_wait():
    own, other, silent = processes(WAITS, WAITS, COMPUTES)
    silent.silent_s = limits.SILENT_LIMIT_S - 1
    assert verdict(own, [other, silent], 600) is None
    silent.silent_s += 2
    assert verdict(own, [other, silent], 600) == (
        "process 2 has given no sign of life for 21 s, and the others wait for it in all_gather "
        "(step 12)"
    )


def test_a_process_that_computes_is_late_only_after_the_long_limit():
    own, late = processes(WAITS, COMPUTES, still_s=599)
    assert verdict(own, [late], 600) is None
    own, late = processes(WAITS, COMPUTES, still_s=601)
    told = verdict(own, [late], 600)
    assert told is not None
    assert "have waited in all_gather (step 12) for 600 s" in told
    assert "process 1 is still at mine.py:3 in look (step 12)" in told
    assert verdict(late, [own], 600) == told, "the late one says it of itself"


def test_a_process_that_saves_may_take_any_time():
    own, late = processes(WAITS, replace(COMPUTES, saving=True), still_s=1e6)
    assert verdict(own, [late], 600) is None


def test_nobody_is_late_where_nobody_waits_and_nobody_is_blamed_where_all_wait():
    own, other = processes(replace(WAITS, collective=None), COMPUTES, still_s=1e6)
    assert verdict(own, [other], 600) is None
    own, other = processes(WAITS, WAITS, still_s=1e6)
    assert (verdict(own, [other], 600) or "").startswith("no process has come out of all_gather")


def test_the_one_that_failed_is_blamed_and_not_those_that_end_because_of_it():
    own, failed, bereft, left = processes(
        WAITS, replace(COMPUTES, state=FAILED, reason="no memory"),
        replace(WAITS, state=BEREFT), replace(WAITS, state=LEFT),
    )  # fmt: skip
    bereft.silent_s = left.silent_s = 1e6
    assert verdict(own, [bereft, left], 600) is None
    told = verdict(own, [bereft, left, failed], 600) or ""
    assert told.startswith("process 1 failed: no memory")


def test_a_dead_process_of_this_machine_is_known_at_once():
    process = subprocess.Popen([sys.executable, "-c", ""])
    record = replace(WAITS, machine=machine_name(), process_id=process.pid)
    time.sleep(1)
    gone = Process(1, record, silent_s=2 * limits.INTERVAL_S)
    assert gone.failure(limits.SILENT_LIMIT_S) == "process 1 is gone: it was killed, or has crashed"
    process.wait()
    assert gone.failure(limits.SILENT_LIMIT_S) is not None
    alive = Process(1, replace(record, process_id=os.getpid()), silent_s=2 * limits.INTERVAL_S)
    assert alive.failure(limits.SILENT_LIMIT_S) is None
    elsewhere = Process(1, replace(record, machine="another"), silent_s=2 * limits.INTERVAL_S)
    assert elsewhere.failure(limits.SILENT_LIMIT_S) is None


def test_time_is_counted_from_the_last_change():
    process = Process(1)
    process.update(None, 1.0)
    process.update(WAITS, 1.0)
    assert (process.silent_s, process.still_s) == (0, 0)
    process.update(replace(WAITS, beat=41), 1.0)
    process.update(replace(WAITS, beat=42), 1.0)
    assert (process.silent_s, process.still_s) == (0, 2)
    process.update(replace(WAITS, beat=42), 1.0)
    assert (process.silent_s, process.still_s) == (1, 3)
    process.update(replace(WAITS, beat=43, calls=8), 1.0)
    assert (process.silent_s, process.still_s) == (0, 0)


def test_a_restart_overwrites_no_run_of_its_own(tmp_path, monkeypatch):
    options = RunOptions(tmp_path, overwrite=True)
    (tmp_path / "run.json").write_text(json.dumps({"status": "running", "launch": "this"}))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert options.after_restart().overwrite
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not options.after_restart().overwrite
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert options.after_restart().overwrite, "an older run, which the first start did not reach"


# --- torchrun -------------------------------------------------------------------------------------

# npo-fast, where a rank has a mishap at the beginning of a step of the first attempt
PROGRAM = """
import os, signal, sys, time
from npo_fast import watch
from npo_fast.cli import main
from npo_fast.errors import OutOfMemory

def enter(stage, enter=watch.enter):
    enter(stage)
    if (stage, os.environ["RANK"]) == (os.environ["STAGE"], os.environ["VICTIM"]):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            with open(os.environ["VICTIM_FILE"], "w") as file:
                file.write(str(os.getpid()))
            exec(os.environ["MISHAP"])

watch.enter = enter
for limit in os.environ.get("LIMITS", "").split():
    name, value = limit.split("=")
    setattr(watch.limits, name, float(value))
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model without dropout, what to forget and what to keep, and the program."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "base")
    write_jsonl(folder / "forget.jsonl", FACTS[6:])
    write_jsonl(folder / "retain.jsonl", FACTS[:6])
    (folder / "program.py").write_text(PROGRAM)
    return folder


class Launch:
    """``torchrun`` of ``count`` processes, of which ``victim`` has a ``mishap`` in step 5."""

    def __init__(
        self, home: Path, output: Path, count: int, victim: int, mishap: str,
        *more: str, restarts: int = 0, **environment: str,
    ) -> None:  # fmt: skip
        self.log, self.victim = output.with_suffix(".log"), output.with_suffix(".victim")
        call = ["unlearn", "--model", str(home / "base"), "--forget", str(home / "forget.jsonl"),
                "--retain", str(home / "retain.jsonl"), "--output", str(output), "--epochs", "6",
                "--lr", "1e-4", "--batch-size", "2", "--save-every", "2", "--no-report",
                *more]  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", str(count), "--max-restarts", str(restarts),
                   str(home / "program.py"), *call]  # fmt: skip
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        own = {"PYTHONPATH": path, "STAGE": "step 5", "VICTIM": str(victim), "MISHAP": mishap,
               "VICTIM_FILE": str(self.victim), **environment}  # fmt: skip
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **own}
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def errors(self) -> list[str]:
        """Messages of processes, by rank."""
        lines = (line.partition("npo-fast: error ")[2] for line in self.text.splitlines())
        return sorted(line for line in lines if line)

    def wait_until(self, condition, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                assert condition(), self.text
            time.sleep(0.1)


@pytest.fixture
def launch(home, tmp_path):
    """Starts a ``Launch`` into ``tmp_path / "run"``, and ends what is left of it."""
    launches = []

    def start(*arguments, **more) -> Launch:
        launches.append(Launch(home, tmp_path / "run", *arguments, **more))
        return launches[-1]

    yield start
    for each in launches:
        if each.process.poll() is None:
            each.process.terminate()
            each.process.wait(timeout=60)


@pytest.mark.slow
def test_a_stopped_process_is_named_within_a_minute_and_the_others_end(launch, tmp_path):
    run = launch(3, 1, "os.kill(os.getpid(), signal.SIGSTOP)")
    run.wait_until(run.victim.exists, 120)
    run.wait_until(lambda: len(run.errors()) == 2, 60)
    for rank, message in zip((0, 2), run.errors(), strict=True):
        assert message.startswith(f"(process {rank} of 3): process 1 has given no sign of life for")
        assert "wait for it in all_gather (step 5, micro-batch 1 of" in message
        assert "--save-every" in message
    os.kill(int(run.victim.read_text()), signal.SIGKILL)  # torchrun does, 30 s later
    assert run.process.wait(timeout=60) == 1
    (kept,) = (tmp_path / "run" / "checkpoints").glob("step-??????")
    assert kept.name in ("step-000002", "step-000004"), "the latter may have been under way"
    assert metadata_of(tmp_path / "run")["status"] == "running"


@pytest.mark.slow
def test_a_killed_process_is_named(launch):
    run = launch(3, 0, "os.kill(os.getpid(), signal.SIGKILL)")
    assert run.process.wait(timeout=120) == 1
    errors = run.errors()
    assert [message[:16] for message in errors] == ["(process 1 of 3)", "(process 2 of 3)"], (
        run.text
    )
    assert all("process 0 is gone: it was killed" in message for message in errors), errors


@pytest.mark.slow
def test_the_others_tell_why_a_process_failed(launch):
    run = launch(3, 2, "raise OutOfMemory('no memory for 3 GiB')")
    assert run.process.wait(timeout=120) == 1
    errors = run.errors()
    assert len(errors) == 3, run.text
    assert errors[2].startswith("(process 2 of 3): no memory for 3 GiB")
    assert all("process 2 failed: no memory for 3 GiB" in message for message in errors[:2]), errors


@pytest.mark.slow
def test_a_process_that_computes_for_long_is_not_taken_for_dead(launch, tmp_path):
    limits = "INTERVAL_S=0.5 SILENT_LIMIT_S=5 NOTICE_S=0.5"
    run = launch(2, 0, "time.sleep(15)", LIMITS=limits)
    assert run.process.wait(timeout=120) == 0, run.text
    assert not run.errors()
    assert run.victim.exists()
    assert metadata_of(tmp_path / "run")["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("recorder", ["2000", "0"], ids=["flight recorder", "none"])
def test_a_process_that_never_comes_to_a_collective_is_named(launch, recorder):
    run = launch(
        2, 1, "time.sleep(1000)", NPO_FAST_COLLECTIVE_TIMEOUT_S="5", TORCH_FR_BUFFER_SIZE=recorder
    )
    assert run.process.wait(timeout=120) == 1
    errors = run.errors()
    assert errors, run.text
    for message in errors:
        assert "have waited in all_gather" in message
        assert "(step 5, micro-batch 1 of" in message
        assert "and process 1 is still at" in message


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_restarts_a_run_that_goes_on_where_it_was(launch, tmp_path, victim):
    output = tmp_path / "run"
    undisturbed = launch(2, victim, "pass")
    assert undisturbed.process.wait(timeout=120) == 0, undisturbed.text
    before, losses = metadata_of(output), losses_of(output)

    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    run = launch(2, victim, kill, "--overwrite", restarts=2)
    assert run.process.wait(timeout=240) == 0, run.text
    after = metadata_of(output)
    assert after["id"] != before["id"], "the first start overwrites"
    (resumed,) = after["resumed"]
    assert resumed["step"] in (2, 4), "the second start goes on; 4 may have been under way"
    assert after["status"] == "finished"
    assert losses_of(output) == losses
    assert (output / "model" / "model.safetensors").read_bytes()


def losses_of(output: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(output / "steps.jsonl")]


@pytest.mark.slow
def test_processes_share_the_checking_of_a_checkpoint(launch, tmp_path):
    """Each reads a part of the files, and what one finds is known to all."""
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    assert launch(2, 0, kill).process.wait(timeout=120) == 1
    shards = sorted((tmp_path / "run" / "checkpoints").glob("step-??????/shards/*.distcp"))
    assert len(shards) == 2
    for shard in shards:
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        run = launch(2, 0, "pass")
        assert run.process.wait(timeout=120) == 1
        assert "no checkpoint in" in run.text
        assert f"{shard} is damaged (its SHA-256 has changed)" in run.text
        shard.write_bytes(content)
    run = launch(2, 0, "pass")
    assert run.process.wait(timeout=120) == 0, run.text
    assert metadata_of(tmp_path / "run")["status"] == "finished"


# once, in a backward
SHORTAGE = """
if not hasattr(watch, "had"):
    import torch
    from npo_fast.trainer.update import Update
    def add(self, loss, cls=Update, add=Update.add, error=torch.OutOfMemoryError):
        cls.add = add
        raise error("no memory for 3 GiB")
    watch.had, Update.add = True, add
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "victim", "more"),
    [
        (2, 1, ("--method", "NPO+KL", "--eval-every", "4")),
        (2, 0, ("--optimizer", "adamw-8bit", "--sharpness-rho", "0.01")),
        (4, 2, ("--lora-rank", "2")),
    ],
)
def test_all_begin_a_step_again_where_one_has_no_memory_for_it(
    launch, tmp_path, count, victim, more
):
    output, tokens = tmp_path / "run", ("--micro-batch-tokens", "64")
    undisturbed = launch(count, victim, "pass", *tokens, *more)
    assert undisturbed.process.wait(timeout=240) == 0, undisturbed.text
    losses = losses_of(output)

    run = launch(count, victim, SHORTAGE, *tokens, *more, "--overwrite")
    assert run.process.wait(timeout=240) == 0, run.text
    assert f"step 5: out of memory on process {victim} (no memory for 3 GiB)" in run.text
    steps = read_jsonl(output / "steps.jsonl")
    assert [line["step"] for line in steps] == list(range(1, len(losses) + 1))
    assert [line["loss"] for line in steps] == pytest.approx(losses, rel=1e-5)
    sizes = [line["micro_batch_tokens"] for line in steps]
    assert sizes[:4] == [64] * 4
    assert len({*sizes[4:]}) == 1
    assert sizes[4] < 64
    assert metadata_of(output)["status"] == "finished"


# as NCCL, whose collectives go on waiting; where there are more tokens than fit
SHORTAGE_OF_A_GPU = """
import torch
from npo_fast.trainer import out_of_memory
from npo_fast.trainer.update import Update
out_of_memory.ends_with_a_process = lambda: False
def add(self, loss, error=torch.OutOfMemoryError):
    raise error("no memory for 3 GiB")
Update.add = add
"""


@pytest.mark.slow
@pytest.mark.parametrize("save_every", ["2", "100"], ids=["from a checkpoint", "from the start"])
def test_gpus_end_where_one_has_no_memory_and_go_on_with_fewer_tokens(launch, tmp_path, save_every):
    more = "--micro-batch-tokens", "64", "--save-every", save_every
    run = launch(2, 1, SHORTAGE_OF_A_GPU, *more, restarts=2)
    assert run.process.wait(timeout=240) == 0, run.text
    error = run.errors()[-1]  # the other one repeats it
    assert error.startswith("(process 1 of 2): step 5: out of memory (no memory for 3 GiB), and")
    assert "other GPUs wait for this one. The same command goes on, with" in error
    output = tmp_path / "run"
    sizes = [line["micro_batch_tokens"] for line in read_jsonl(output / "steps.jsonl")]
    assert len(sizes) == 12
    (less,) = {*sizes} - {64}
    assert f"64 tokens at a time did not fit the memory: {less} from here" in run.text
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0] == less) == (save_every == "100")
    assert metadata_of(output)["status"] == "finished"


# from here on
FULL_DISK = """
import torch.distributed.checkpoint as dcp
def write_data(*_):
    raise OSError(28, "No space left on device")
dcp.FileSystemWriter.write_data = write_data
"""


# once, where it puts rows of the final model together
FULL_AT_THE_END = """
from npo_fast.model import shard_files
def consolidate(*a, files=shard_files, real=shard_files._consolidate_safetensors_files, **k):
    files._consolidate_safetensors_files = real
    raise OSError(28, "No space left on device")
shard_files._consolidate_safetensors_files = consolidate
"""


@pytest.mark.slow
def test_a_full_disk_at_the_end_is_waited_for(launch, tmp_path):
    run = launch(2, 1, FULL_AT_THE_END, "--save-wait", "1")
    assert run.process.wait(timeout=240) == 0, run.text
    assert "No space left on device (process 1)" in run.text
    assert metadata_of(tmp_path / "run")["status"] == "finished"
    assert {path.name for path in (tmp_path / "run" / "model").glob("*.safetensors")} == {
        "model.safetensors"
    }


@pytest.mark.slow
def test_a_process_that_stops_while_all_save_is_named(launch):
    stop = FULL_AT_THE_END.replace(
        'raise OSError(28, "No space left on device")',
        "import os, signal; os.kill(os.getpid(), 19)",
    )
    run = launch(2, 1, stop)
    run.wait_until(run.victim.exists, 120)
    run.wait_until(run.errors, 120)
    (message,) = run.errors()
    assert message.startswith("(process 0 of 2): process 1 has given no sign of life for"), message
    os.kill(int(run.victim.read_text()), signal.SIGKILL)
    assert run.process.wait(timeout=60) == 1


@pytest.mark.slow
def test_a_full_disk_of_one_process_costs_a_checkpoint_and_not_the_run(launch, tmp_path):
    run = launch(2, 1, FULL_DISK)
    assert run.process.wait(timeout=240) == 0, run.text
    assert "NO CHECKPOINT at step 6: cannot save" in run.text
    assert "No space left on device (process 1)" in run.text
    output = tmp_path / "run"
    (kept,) = (output / "checkpoints").iterdir()
    assert kept.name in ("step-000002", "step-000004"), "the latter may still be under way"
    assert metadata_of(output)["status"] == "finished"
