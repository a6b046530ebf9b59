"""A disk that is full, read-only or gone costs no weights: whatever it fails at, and whenever."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import npo_fast
from npo_fast.cli import main
from npo_fast.errors import CannotSaveError, UserError
from npo_fast.runs import Callback, EvaluationOptions, ReportOptions, RunOptions, TrainSettings
from npo_fast.runs.records import Journal
from npo_fast.runs.saving import Saving
from tests.helpers import FACTS, metadata_of, read_jsonl, save_tiny_model, write_jsonl

STEPS = 4
TRAINING = TrainSettings(epochs=2, batch_size=2, lr=1e-3, warmup_steps=1)
QUIET, NO_LOOKS = ReportOptions(no_report=True), EvaluationOptions()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "base")
    write_jsonl(folder / "forget.jsonl", FACTS[6:])
    return folder


@pytest.fixture
def full(monkeypatch, tmp_path):
    """Makes every folder of a name below a run unwritable, until it says otherwise."""
    names: set[str] = set()
    real = npo_fast.runs.folder.save_folder

    def save_folder(folder, write):
        if names & {folder.name, folder.name.split("-")[0]} and tmp_path / "run" in folder.parents:
            raise CannotSaveError(f"cannot save {folder}: [Errno 28] No space left on device")
        return real(folder, write)

    monkeypatch.setattr("npo_fast.runs.folder.save_folder", save_folder)
    monkeypatch.setattr("npo_fast.runs.saving.PAUSE_S", 0.05)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return names


def unlearn(home: Path, output: Path, evaluation=NO_LOOKS, callbacks=(), **run):
    return npo_fast.unlearn(
        str(home / "base"), forget=str(home / "forget.jsonl"), method="NPO", training=TRAINING,
        report=QUIET, evaluation=evaluation, callbacks=callbacks, run=RunOptions(output, **run),
    )  # fmt: skip


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory):
    return weights(unlearn(home, tmp_path_factory.mktemp("undisturbed") / "run").folder)


def test_a_run_that_cannot_be_saved_is_complete_in_the_fallback(home, tmp_path, full, undisturbed):
    full.add("model")
    run = unlearn(home, tmp_path / "run", fallback_output=tmp_path / "other")
    assert run.folder == tmp_path / "other"
    assert weights(run.folder) == undisturbed
    assert len(run.records) == STEPS
    assert metadata_of(run.folder)["status"] == "finished"
    assert metadata_of(tmp_path / "run")["moved_to"] == str(tmp_path / "other")
    with pytest.raises(UserError, match="went on in .*other"):
        unlearn(home, tmp_path / "run")
    with pytest.raises(UserError, match="is not empty"):
        unlearn(home, tmp_path / "new", fallback_output=tmp_path / "other")


def test_a_run_waits_for_room(home, tmp_path, full, undisturbed, monkeypatch):
    full.add("model")

    def say(*_):  # as soon as it waits
        full.clear()
        return "NOT SAVED YET"

    monkeypatch.setattr("npo_fast.runs.saving._not_yet", say)
    run = unlearn(home, tmp_path / "run")
    assert run.folder == tmp_path / "run"
    assert weights(run.folder) == undisturbed


def test_a_run_that_waited_in_vain_is_complete_in_a_folder_of_the_system(
    home, tmp_path, full, undisturbed
):
    full.add("model")
    with pytest.raises(CannotSaveError, match="the run is complete, with its model, in") as error:
        unlearn(home, tmp_path / "run", save_wait=0)
    (folder,) = (tmp_path / "tmp").glob("npo-fast-*/run")
    assert str(folder) in str(error.value)
    assert weights(folder) == undisturbed
    assert len(read_jsonl(folder / "steps.jsonl")) == STEPS


def test_a_checkpoint_that_cannot_be_written_is_tried_again_at_the_next(home, tmp_path, full):
    full.add("step")
    seen = []

    class Room(Callback):
        def on_step(self, record):
            if record.step == 2:
                full.clear()

        def on_checkpoint(self, path):
            seen.append(path.name)

    unlearn(home, tmp_path / "run", callbacks=[Room()], save_every=1)
    assert seen == ["step-000003"]


def test_the_best_model_is_kept_elsewhere_and_becomes_the_final_one(home, tmp_path, full):
    looks = EvaluationOptions(eval_every=1, eval_records=2, keep_best="forget.probability")
    expected = unlearn(home, tmp_path / "whole", looks)
    full.add("best")
    run = unlearn(home, tmp_path / "run", looks, fallback_output=tmp_path / "other")
    assert run.folder == tmp_path / "other"
    assert weights(run.folder) == weights(expected.folder)
    assert run.evaluations == expected.evaluations


def test_a_run_that_moved_goes_on_there(home, tmp_path, full, undisturbed):
    full.add("step")

    class Stop(Callback):
        def on_step(self, record):
            if record.step == 2:
                os.kill(os.getpid(), 15)

    # the signal is seen by the next step's checkpoint
    with pytest.raises(npo_fast.errors.Interrupted, match=r"with --output|with output") as stop:
        unlearn(home, tmp_path / "run", callbacks=[Stop()], fallback_output=tmp_path / "other")
    assert str(tmp_path / "other") in str(stop.value)
    assert weights(unlearn(home, tmp_path / "other").folder) == undisturbed


def test_a_callback_that_fails_costs_no_step(home, tmp_path, undisturbed):
    class Broken(Callback):
        def on_step(self, record):
            if record.step == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        unlearn(home, tmp_path / "run", callbacks=[Broken()])
    assert (tmp_path / "run/checkpoints/step-000003").is_dir()
    assert weights(unlearn(home, tmp_path / "run").folder) == undisturbed


def test_lines_wait_for_room_and_are_never_cut(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "steps.jsonl")
    journal.append({"step": 1})
    real, room = os.write, [3]

    def write(handle, data):
        taken = min(room[0], len(data))
        room[0] -= taken
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[:taken])

    monkeypatch.setattr(os, "write", write)
    journal.append({"step": 2})
    assert read_jsonl(tmp_path / "steps.jsonl") == [{"step": 1}]
    assert journal.records() == [{"step": 1}, {"step": 2}]
    room[0] = 1000
    journal.append({"step": 3})
    assert [line["step"] for line in read_jsonl(tmp_path / "steps.jsonl")] == [1, 2, 3]


def test_saving_asks_no_folder_that_holds_files(tmp_path):
    tried = []

    def write(folder):
        tried.append(folder)
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(CannotSaveError, match="Read-only"):
        Saving(tmp_path / "other").insist(tmp_path / "run", write)
    assert tried[:2] == [tmp_path / "run", tmp_path / "other"]
    assert len(tried) > 2  # folders of the system
    assert not list(Path(tempfile.gettempdir()).glob("npo-fast-*/run"))


def test_measures_are_not_lost_with_their_logs(home, tmp_path, monkeypatch, capsys):
    def save_result(logs, folder, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("npo_fast.runs.scores.save_result", save_result)
    command = ["evaluate", "--model", str(home / "base"), "--forget", str(home / "forget.jsonl"),
               "--output", str(tmp_path / "logs"), "--max-new-tokens", "2"]  # fmt: skip
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "forget probability" in shown.out
    assert "NO LOGS SAVED" in shown.err


DRIVER = """
import ctypes, errno, json, os, sys, tempfile
from pathlib import Path
import torch
from npo_fast.cli import main
library, home, work, reason, stride, most = sys.argv[1:]
home, work = Path(home), Path(work)
torch.set_num_threads(1)
faults = ctypes.CDLL(library)
faults.fault_begin.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_long, ctypes.c_int]

def run(name, first, last):
    folder = work / name
    (folder / "tmp").mkdir(parents=True)
    tempfile.tempdir = str(folder / "tmp")
    faults.fault_begin(f"{folder}/run".encode(), first, last, getattr(errno, reason))
    code = main(["unlearn", "--model", f"{home}/base", "--forget", f"{home}/forget.jsonl",
                 "--method", "NPO", "--output", f"{folder}/run", "--epochs", "2", "--batch-size",
                 "2", "--lr", "1e-3", "--warmup-steps", "1", "--save-every", "2", "--no-report",
                 "--save-wait", "0"])
    return code, faults.fault_count()

forever = 1 << 60
code, operations = run("whole", forever, forever)  # here: what is forked after it is warm
assert code == 0
print("operations", operations)
for k in range(1, operations + 1, int(stride)):
    for last in (k, forever) if most == "both" else (forever,):
        name = f"{k}-{'once' if last == k else 'on'}"
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(json.dumps([name, code]), flush=True)
            continue
        (work / name).mkdir()
        log = os.open(work / name / "log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
        try:
            code = run(name, k, last)[0]
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        os._exit(code)
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """A library that lets the kth operation below a folder fail, of whatever code."""
    if (compiler := shutil.which("cc")) is None or sys.platform != "linux":
        pytest.skip("no C compiler, or no Linux")
    library = tmp_path_factory.mktemp("faults") / "full_disk.so"
    source = Path(__file__).with_name("full_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["ENOSPC", "EACCES"])
def test_a_failure_at_any_operation_costs_no_weights(home, tmp_path, faults, undisturbed, reason):
    """All weights are where the last message says, or no step was taken; never a traceback.

    ``NPO_FAST_FAULTS`` is the stride over the operations: 1 tries every one, a few minutes.
    """
    stride = os.environ.get("NPO_FAST_FAULTS", "13")
    most = "both" if reason == "ENOSPC" else "on"
    arguments = [str(faults), str(home), str(tmp_path), reason, stride, most]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments], capture_output=True, text=True, timeout=3000,
        env={**os.environ, "LD_PRELOAD": str(faults), "TQDM_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    tried = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(tried) > 5
    saved = 0
    for name, code in tried:
        folder = tmp_path / name
        log = (folder / "log").read_text()
        assert "Traceback" not in log, (name, log)
        models = [p.parents[1] for p in folder.rglob("model/model.safetensors")
                  if p.read_bytes() == undisturbed]  # fmt: skip
        if models:
            saved += 1
            (home_of_model,) = models
            assert str(home_of_model) in log, (name, log)
            assert code in (0, 1), (name, log)
            assert len(read_jsonl(home_of_model / "steps.jsonl")) == STEPS, (name, log)
        else:
            assert code in (1, 2), (name, log)
            assert not list(folder.rglob("*.safetensors")), (name, log)
            assert (
                not (folder / "run/steps.jsonl").exists()
                or not (folder / "run/steps.jsonl").read_text()
            ), (name, log)
    assert saved > len(tried) / 2


@pytest.mark.slow
def test_a_small_disk_is_refused_before_training(home, tmp_path):
    """On a real file system that is too small, in a namespace of its own."""
    place = tmp_path / "small"
    place.mkdir()
    arguments = ["unlearn", "--model", str(home / "base"), "--forget", str(home / "forget.jsonl"),
                 "--method", "NPO", "--output", str(place / "run")]  # fmt: skip
    command = (
        f"mount -t tmpfs -o size=200k tmpfs {place} || exit 77; "
        f"{sys.executable} -m npo_fast {' '.join(arguments)} --dry-run; "
        f"echo $?; ls -A {place}; {sys.executable} -m npo_fast {' '.join(arguments)}; echo $?"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr.split(":")[0]:
        pytest.skip("no mount namespaces here")
    assert done.stdout.split() == ["2", "2"], done.stderr
    assert done.stderr.count("too little room: the model in") == 2
    assert f"loading {home}" not in done.stderr, "the weights are not read"
