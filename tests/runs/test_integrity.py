"""What a run wrote is what is read again: not a bit less, and nothing of another run."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import npo_fast
from npo_fast.errors import UserError
from npo_fast.model.load import load_model, load_tokenizer
from npo_fast.runs.folder import RunFolder
from npo_fast.runs.options import EvaluationOptions, ModelOptions, ReportOptions, RunOptions
from npo_fast.trainer.settings import StepRecord, TrainSettings
from tests.helpers import FACTS, metadata_of, read_jsonl, save_tiny_model, slow_but, write_jsonl

FORGET, RETAIN = FACTS[7:], FACTS[:4]
EVALUATION = EvaluationOptions(eval_every=2, eval_records=2, keep_best="forget.probability")


class Crash(BaseException):
    """What leaves a run no time for one more checkpoint."""


class Stop(npo_fast.Callback):
    """Ends a run after a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record):
        if record.step == self.step:
            raise Crash


class At(npo_fast.Callback):
    """Does something to the folder of a run after a step."""

    def __init__(self, step: int, act: Callable[[Path], object]) -> None:
        self.step, self.act = step, act

    def on_start(self, training):
        self.folder = training.folder.folder

    def on_step(self, record):
        if record.step == self.step:
            self.act(self.folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("home") / "base")


def unlearn(base: Path, output: Path, *callbacks: npo_fast.Callback, seed: int = 0) -> npo_fast.Run:
    """Eight steps with log-probs of the reference, evaluations, a best model and checkpoints."""
    return npo_fast.unlearn(
        str(base), forget=FORGET, retain=RETAIN, output=output, callbacks=callbacks,
        training=TrainSettings(epochs=4, batch_size=2, lr=3e-3, seed=seed),
        report=ReportOptions(report_records=1, max_new_tokens=2), evaluation=EVALUATION,
        loading=ModelOptions(device="cpu"), run=RunOptions(save_every=3),
    )  # fmt: skip


def result_of(folder: Path) -> dict:
    """All that a run has found: weights, records, measures."""
    metadata = metadata_of(folder)
    return {
        "steps": [{**step, "time_ms": 0} for step in read_jsonl(folder / "steps.jsonl")],
        "evaluations": read_jsonl(folder / "evaluations.jsonl"),
        "weights": (folder / "model/model.safetensors").read_bytes(),
        **{name: metadata[name] for name in ("status", "before", "after", "best")},
    }


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> dict:
    """The result of a run that nothing disturbed."""
    return result_of(unlearn(base, tmp_path_factory.mktemp("runs") / "whole").folder)


@pytest.fixture(scope="module")
def interrupted(base, tmp_path_factory) -> dict[str, Path]:
    """A run that broke off after step 5, a twin of it, and one with another seed."""
    home, runs = tmp_path_factory.mktemp("interrupted"), {"run": 0, "twin": 0, "other": 1}
    for name, seed in runs.items():
        with pytest.raises(Crash):
            unlearn(base, home / name, Stop(5), seed=seed)
    return {name: home / name for name in runs}


FILES = (
    "run.json", "steps.jsonl", "evaluations.jsonl", "references.pt",
    *(f"checkpoints/{folder}/{file}" for folder, more in
      (("step-000003", "state.pt"), ("best", "evaluation.json"))
      for file in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                   "tokenizer_config.json", "manifest.json", more)),
)  # fmt: skip


def test_every_file_of_a_run_is_damaged_below(interrupted):
    files = [path for path in interrupted["run"].rglob("*") if path.is_file()]
    assert {path.relative_to(interrupted["run"]).as_posix() for path in files} == {*FILES}


def flip(share: float) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        data = bytearray(content)
        data[min(int(share * len(data)), len(data) - 1)] ^= 1 << int(share * 8) % 8
        return bytes(data)

    return change


def zero_block(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(min(64, len(content) - middle)) + content[middle + 64 :]


def without_first_line(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[1:])


def with_first_line_twice(content: bytes) -> bytes:
    return content.splitlines(keepends=True)[0] + content


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    **{f"bit at {share}": flip(share) for share in (0.0, 0.01, 0.2, 0.5, 0.77, 0.93, 1.0)},
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\0",
    "zeros": zero_block,
    "line lost": without_first_line,
    "line twice": with_first_line_twice,
}


def assert_same_or_refused(base: Path, run: Path, file: str, whole: dict) -> None:
    """The run goes on to the same bits, or an error names the file."""
    refused = None
    try:
        unlearn(base, run)
    except UserError as error:
        refused = str(error)
    if refused is None:
        assert result_of(run) == whole
        return
    swapped = ("another run", "that differs")  # run.json is whole, and of a sibling
    names = (Path(file).name, *(swapped if file == "run.json" else ()))
    assert any(name in refused for name in names), refused
    assert "\n" not in refused


@pytest.mark.parametrize(
    "file", slow_but(["steps.jsonl", "checkpoints/step-000003/model.safetensors"], FILES)
)
def test_a_damaged_file_is_named_or_makes_no_difference(base, interrupted, whole, tmp_path, file):
    original = (interrupted["run"] / file).read_bytes()
    for name, change in DAMAGE.items():
        if change(original) == original:
            continue
        run = shutil.copytree(interrupted["run"], tmp_path / name)
        (run / file).write_bytes(change(original))
        assert_same_or_refused(base, run, file, whole)
        shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.parametrize("sibling", ["twin", "other"])
def test_files_of_another_run_make_no_difference_or_are_named(
    base, interrupted, whole, tmp_path, sibling
):
    folders = ["checkpoints/step-000003", "checkpoints/best"]
    for number, name in enumerate([*FILES, *folders]):
        run = shutil.copytree(interrupted["run"], tmp_path / str(number))
        if name in folders:
            shutil.rmtree(run / name)
            shutil.copytree(interrupted[sibling] / name, run / name)
        else:
            shutil.copy(interrupted[sibling] / name, run / name)
        assert_same_or_refused(base, run, name if "." in name else "manifest.json", whole)


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in FILES if file != "run.json"])
def test_a_lost_file_is_named_or_makes_no_difference(base, interrupted, whole, tmp_path, file):
    run = shutil.copytree(interrupted["run"], tmp_path / "run")
    (run / file).unlink()
    assert_same_or_refused(base, run, file, whole)


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["pytorch_model.bin", "model.safetensors.index.json"])
def test_a_file_too_many_is_not_loaded_instead(base, interrupted, tmp_path, extra):
    run = shutil.copytree(interrupted["run"], tmp_path / "run")
    (run / "checkpoints/step-000003" / extra).write_bytes(b"{}")
    with pytest.raises(UserError, match=f"{extra} is not among the files that were saved"):
        unlearn(base, run)


def test_a_trained_run_with_a_damaged_model_goes_back_to_its_checkpoint(base, whole, tmp_path):
    """It was killed when its model was saved and its report not yet made."""
    output = unlearn(base, tmp_path / "run").folder
    metadata = {**metadata_of(output), "status": "running"}
    del metadata["sha256"], metadata["after"]
    (output / "run.json").write_text(json.dumps(metadata))
    model = output / "model/model.safetensors"
    model.write_bytes(flip(0.9)(model.read_bytes()))
    resumed = unlearn(base, output)
    assert resumed.metadata["resumed"][0]["step"] == 6
    assert result_of(output) == whole


# ---- a run that has ended ----


@pytest.fixture
def finished(base, tmp_path) -> Path:
    return npo_fast.finetune(
        str(base), train=FACTS, output=tmp_path / "run",
        training=TrainSettings(epochs=1, batch_size=5),
    ).folder  # fmt: skip


def add_to_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: t + 1e-3 for name, t in tensors.items()}, model / "model.safetensors")


EDITS = {
    "model.safetensors": add_to_weights,
    "config.json": lambda m: (m / "config.json").write_text(
        (m / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03')
    ),
    "tokenizer.json": lambda m: (m / "tokenizer.json").write_bytes(
        zero_block((m / "tokenizer.json").read_bytes())
    ),
    "generation_config.json": lambda m: (m / "generation_config.json").unlink(),
    "chat_template.jinja": lambda m: (m / "chat_template.jinja").write_text("{{ messages }}"),
    "pytorch_model.bin": lambda m: (m / "pytorch_model.bin").write_bytes(b"x"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_model_that_changed_in_its_run_is_refused_until_its_manifest_goes(finished, name):
    EDITS[name](finished / "model")
    for model in (finished, finished / "model"):
        with pytest.raises(UserError, match=f"{name} .*or delete .*manifest.json to take"):
            npo_fast.evaluate(str(model), forget=FACTS[:1])
        with pytest.raises(UserError, match=name):
            load_model(str(model), device="cpu")
    (finished / "model/manifest.json").unlink()
    if name != "tokenizer.json":  # that one is broken
        npo_fast.evaluate(
            npo_fast.Run(finished), forget=FACTS[:1], loading=ModelOptions("", "plain")
        )


def test_a_card_and_notes_beside_a_model_change_nothing(finished):
    """The card is written after the manifest; a copy of the folder is anybody's."""
    model = finished / "model"
    (model / "README.md").write_text("# Mine")
    (model / ".gitattributes").write_text("x")
    load_model(str(finished), device="cpu")
    load_tokenizer(str(finished))
    shutil.copytree(model, finished.parent / "copy")
    add_to_weights(finished.parent / "copy")
    load_model(str(finished.parent / "copy"), device="cpu")


def test_a_model_of_another_run_in_its_place_is_refused(base, finished, tmp_path):
    other = npo_fast.finetune(
        str(base), train=FACTS, output=tmp_path / "other",
        training=TrainSettings(epochs=1, batch_size=5, seed=1),
    ).folder  # fmt: skip
    shutil.rmtree(finished / "model")
    shutil.copytree(other / "model", finished / "model")
    with pytest.raises(UserError, match=r"model/manifest.json is of another run"):
        load_model(str(finished), device="cpu")


def test_a_report_names_records_that_were_edited(finished):
    steps = finished / "steps.jsonl"
    steps.write_text(steps.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(UserError, match=r"steps.jsonl is damaged .*or delete .*manifest.json"):
        npo_fast.report(finished, output=finished.parent / "page.html")


# ---- a folder that changes while its run goes on ----

LOSSES = {
    "the folder": shutil.rmtree,
    "the folder's name": lambda folder: folder.rename(folder.with_name("moved")),
    "steps": lambda folder: (folder / "steps.jsonl").unlink(),
    "a part of the steps": lambda folder: (folder / "steps.jsonl").write_text(""),
    "evaluations": lambda folder: (folder / "evaluations.jsonl").unlink(),
    "metadata": lambda folder: (folder / "run.json").unlink(),
    "references and metadata": lambda folder: [
        (folder / name).unlink() for name in ("run.json", "references.pt")
    ],
}


@pytest.mark.parametrize("kind", slow_but(["the folder"], LOSSES))
@pytest.mark.parametrize("step", slow_but([2], [2, 7, 8]))
def test_what_is_deleted_in_mid_run_is_written_again(
    base, whole, tmp_path, kind, step, monkeypatch
):
    warnings: list[str] = []
    monkeypatch.setattr(logging.getLogger("npo_fast.runs.folder"), "warning", warnings.append)
    run = unlearn(base, tmp_path / "run", At(step, LOSSES[kind]))
    if step == 8 and kind in ("the folder", "the folder's name"):  # the best model goes with it
        assert "cannot read" in run.metadata["best_lost"]
        assert run.metadata["status"] == "finished"
        assert "best" not in run.metadata
        assert (run.folder / "model/model.safetensors").is_file()
    else:
        assert result_of(run.folder) == whole
    assert len(read_jsonl(tmp_path / "run/steps.jsonl")) == 8
    assert len(warnings) == 1
    assert "went missing or changed while it goes on: written again from memory" in warnings[0]


@pytest.mark.slow
def test_a_final_model_that_is_damaged_is_no_checkpoint_under_the_name_of_the_best(base, tmp_path):
    class Enough(npo_fast.Callback):
        def on_step(self, record):
            self.should_stop = "enough" if record.step >= 3 else None

    folder = unlearn(base, tmp_path / "run", Enough()).folder
    metadata = {**metadata_of(folder), "status": "running"}  # killed before it said how it ended
    del metadata["sha256"]
    (folder / "run.json").write_text(json.dumps(metadata))
    model = folder / "model/model.safetensors"
    model.write_bytes(flip(0.5)(model.read_bytes()))
    run = unlearn(base, folder, Enough())
    assert run.metadata["status"] == "finished"
    best = json.loads((folder / "checkpoints/best/evaluation.json").read_text())
    assert run.metadata["best"]["step"] == best["step"]
    assert model.read_bytes() == (folder / "checkpoints/best/model.safetensors").read_bytes()


def test_a_model_that_is_deleted_during_the_report_is_saved_again(base, whole, tmp_path):
    class Late(npo_fast.Callback):
        def on_end(self):
            shutil.rmtree(tmp_path / "run")

    assert result_of(unlearn(base, tmp_path / "run", Late()).folder) == whole


@pytest.mark.slow
def test_a_run_whose_place_was_taken_goes_on_beside_it(base, whole, tmp_path):
    def replace(folder):
        shutil.rmtree(folder)
        unlearn(base, folder, seed=1)

    run = unlearn(base, tmp_path / "run", At(1, replace))
    assert run.folder == tmp_path / f"run-{run.metadata['id']}"
    assert result_of(run.folder) == whole
    assert metadata_of(tmp_path / "run")["settings"]["training"]["seed"] == 1


# ---- two processes and one folder ----

RECORD = StepRecord(
    step=1, steps=2, epoch=0.5, loss=1.0, grad_norm=1.0, lr=1e-3, terms={}, log_probs={},
    tokens=1, time_ms=1.0, micro_batch_tokens=1,
)  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_process_deletes_nothing_before_it_has_the_folder(tmp_path):
    """Both looked before the other began; one begins while or after the other is at work."""
    folder = tmp_path / "run"
    first = RunFolder.begin(folder, False, {}, None, {"forget": torch.zeros(3)})
    first.log(RECORD)
    before = contents(folder)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="another process writes to the run"):
            RunFolder.begin(folder, overwrite, {}, None)
        assert contents(folder) == before
    first.finish("interrupted")
    before = contents(folder)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="another process had a run in .*run meanwhile"):
            RunFolder.begin(folder, overwrite, {}, None)
        assert contents(folder) == before


@pytest.mark.slow
def test_of_runs_that_start_at_once_one_is_whole_and_the_others_refused(base, tmp_path):
    facts = write_jsonl(tmp_path / "facts.jsonl", FACTS)
    command = [sys.executable, "-m", "npo_fast", "finetune", "--model", str(base), "--train",
               str(facts), "--output", str(tmp_path / "run"), "--epochs", "40"]  # fmt: skip
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for _ in range(3)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2, 2], errors
    for code, error in zip(codes, errors, strict=True):
        assert code == 0 or "another process" in error or "has ended" in error, error
    steps = read_jsonl(tmp_path / "run/steps.jsonl")
    assert [step["step"] for step in steps] == list(range(1, steps[-1]["steps"] + 1))
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"
    load_model(str(tmp_path / "run"), device="cpu")
