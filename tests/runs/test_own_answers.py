"""``--retain auto``: the model's own answers to neutral prompts are what to keep."""

import pytest

import npo_fast
from npo_fast import Callback, ModelOptions, ReportOptions, TrainSettings
from npo_fast.cli import main
from npo_fast.runs.own_answers import _whole_sentences
from tests.helpers import FACTS, metadata_of, read_jsonl, save_tiny_model, write_jsonl


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "untaught")
    npo_fast.finetune(  # so that it says whole sentences
        str(folder / "untaught"), train=FACTS, output=folder / "model",
        loading=ModelOptions(max_length=96),
        training=TrainSettings(epochs=60, batch_size=10, lr=1e-2, warmup_steps=5),
    )  # fmt: skip
    write_jsonl(folder / "forget.jsonl", FACTS[:4])
    return folder


def run(home, output, *callbacks, **more):
    arguments = {"forget": str(home / "forget.jsonl"), "retain": "auto", **more}
    return npo_fast.unlearn(
        str(home / "model"), output=output, callbacks=callbacks,
        report=ReportOptions(no_report=True), loading=ModelOptions(max_length=96),
        training=TrainSettings(epochs=2, batch_size=2, lr=1e-3), **arguments,
    )  # fmt: skip


class _Stumble(Callback):
    def on_step(self, record):
        if record.step == 2:
            raise ValueError("here")


def test_the_models_answers_are_kept_and_a_run_that_goes_on_reads_them(home, tmp_path):
    with pytest.raises(ValueError, match="here"):
        run(home, tmp_path / "run", _Stumble())
    kept = tmp_path / "run/retain-auto.jsonl"
    rows = read_jsonl(kept)
    assert len({row["question"] for row in rows}) == len(rows) > 8
    assert all(row["answer"].strip() for row in rows)
    data = metadata_of(tmp_path / "run")["data"]["retain"]
    assert data["records"] == len(rows)
    written = kept.read_bytes()
    run(home, tmp_path / "run")
    assert metadata_of(tmp_path / "run")["resumed"]
    assert kept.read_bytes() == written
    again = run(home, tmp_path / "named", retain=str(kept))  # the same, as a file of one's own
    losses = [[s["loss"] for s in read_jsonl(r / "steps.jsonl")] for r in
              (tmp_path / "run", again.folder)]  # fmt: skip
    assert losses[0] == losses[1]


def test_raw_texts_get_continuations_of_neutral_openings(home, tmp_path):
    texts = [{"text": " ".join(fact.values())} for fact in FACTS[:4]]
    run(home, tmp_path / "run", forget=texts)
    rows = read_jsonl(tmp_path / "run/retain-auto.jsonl")
    assert rows[0]["text"].startswith("The history of the city begins")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("1. Wash it.\n2. Cut it.\n3. Cook the", "1. Wash it.\n2. Cut it."),
        ("1. Wash it.\n2. Cut it.\n3.", "1. Wash it.\n2. Cut it."),
        ("1. Wash", ""),
        ("The value of pi is 3.14159 and so", ""),
        ("Pi is near 3. It was Dr. Watson who", "Pi is near 3."),
        ("See www.example.com/page", ""),
        ('She said "No!" Then J. Smith', 'She said "No!"'),
        ("阿达住在罗马。她", "阿达住在罗马。"),
        ("It goes on. And", "It goes on."),
    ],
)
def test_a_cut_answer_ends_with_a_whole_sentence(text, whole):
    assert _whole_sentences(text) == whole


def test_prompts_that_leave_no_room_are_left_out(home, tmp_path, capsys):
    command = ["unlearn", "--model", str(home / "model"), "--forget", str(home / "forget.jsonl"),
               "--retain", "auto", "--no-report", "--epochs", "1",
               "--output", str(tmp_path / "run")]  # fmt: skip
    for dry in (["--dry-run"], []):
        assert main([*command, "--max-length", "72", *dry]) == 0
    assert 8 <= len(read_jsonl(tmp_path / "run/retain-auto.jsonl")) < 100
    assert main([*command, "--max-length", "28", "--dry-run", "--overwrite"]) == 2
    assert "as far as both fit into --max-length 28" in capsys.readouterr().err


def test_what_auto_cannot_do_is_refused_by_name(home, tmp_path, capsys):
    command = ["unlearn", "--model", str(home / "model"), "--forget", str(home / "forget.jsonl"),
               "--output", str(tmp_path / "run")]  # fmt: skip
    assert main([*command, "--method", "NPO", "--retain", "auto"]) == 2
    assert "NPO reads no retain data; leave out --retain auto" in capsys.readouterr().err
    assert main(command) == 2
    assert "take the model's own answers (--retain auto)" in capsys.readouterr().err
    assert main([*command, "--retain", "auto", "--dry-run"]) == 0
    assert "answers of the model, not made in a dry run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
