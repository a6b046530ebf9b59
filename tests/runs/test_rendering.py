"""How text is rendered is a part of a run: pinned when it begins, kept by what comes after it."""

import json
import os
import signal
from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import npo_fast
from npo_fast.cli import main
from npo_fast.data import Record
from npo_fast.errors import Interrupted, UserError
from npo_fast.runs.options import ModelOptions, ReportOptions, RunOptions
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import FACTS, metadata_of, save_tiny_model, write_jsonl

DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
DAYS = [datetime(2026, 1, day) for day in (1, 2, 3)]


class Clock(datetime):
    """Shows the day that a test sets."""

    today_is = DAYS[0]

    @classmethod
    def now(cls, tz=None):
        return cls.today_is


@pytest.fixture
def base(tmp_path) -> Path:
    save_tiny_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def clock(monkeypatch) -> type[Clock]:
    monkeypatch.setattr("npo_fast.runs.models.datetime", Clock)
    monkeypatch.setattr(Clock, "today_is", DAYS[0])
    return Clock


class InterruptAt(npo_fast.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record):
        if record.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def unlearn(base: Path, output: Path, *callbacks, **loading) -> npo_fast.Run:
    return npo_fast.unlearn(
        str(base), forget=FACTS[:4], method="NPO", output=output, callbacks=callbacks,
        loading=ModelOptions(**loading), report=ReportOptions(no_report=True),
        training=TrainSettings(epochs=3, batch_size=2), run=RunOptions(save_every=1),
    )  # fmt: skip


def prompts(model, tmp_path: Path, **loading) -> list[str]:
    scores = npo_fast.evaluate(
        model, forget=FACTS[:1], loading=ModelOptions(**loading),
        evaluation=npo_fast.EvaluationSettings(max_new_tokens=2),
    )  # fmt: skip
    return [row[0] for row in scores.logs["eval_log_forget.json"]["generated_text"]]


def test_the_date_of_a_run_is_that_of_its_first_day(base, clock, tmp_path):
    with pytest.raises(Interrupted):
        unlearn(base, tmp_path / "run", InterruptAt(4))
    clock.today_is = DAYS[1]
    run = unlearn(base, tmp_path / "run")
    assert run.metadata["status"] == "finished"
    assert run.metadata["rendering"]["now"] == DAYS[0].isoformat()
    whole = unlearn(base, tmp_path / "whole")
    assert whole.metadata["rendering"]["now"] == DAYS[1].isoformat(), "a new run, a new date"
    assert whole.metadata["data"] != run.metadata["data"]


def test_what_comes_after_a_run_renders_as_it_did(base, clock, tmp_path):
    run = unlearn(base, tmp_path / "run", system_prompt="Be kind.")
    clock.today_is = DAYS[2]
    rendered = "01 Jan 2026<system>Be kind.<|end|><user>Who lives in house 0?<|end|><assistant>"
    for model in (run, run.folder, run.folder / "model", str(run.folder)):
        assert prompts(model, tmp_path) == [rendered]
    assert prompts(run, tmp_path, system_prompt="Be brief.") == [rendered.replace("kind", "brief")]
    assert prompts(base, tmp_path) == ["03 Jan 2026<user>Who lives in house 0?<|end|><assistant>"]
    again = unlearn(run.folder, tmp_path / "again")
    assert again.metadata["rendering"] == run.metadata["rendering"]
    npo_fast.attack(run, forget=FACTS[:4], output=tmp_path / "attack",
                    attacks=npo_fast.AttackOptions(attacks="quantize", bits="8"))  # fmt: skip
    log = json.loads((tmp_path / "attack" / "before" / "eval_log_forget.json").read_text())
    assert log["generated_text"][0][0] == rendered


def test_another_template_is_not_called_other_data(base, clock, tmp_path):
    with pytest.raises(Interrupted):
        unlearn(base, tmp_path / "run", InterruptAt(1))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = DATED.replace("<assistant>", "<model>")  # which no token shows
    tokenizer.save_pretrained(base)
    with pytest.raises(Interrupted):
        unlearn(base, tmp_path / "run", InterruptAt(4))
    tokenizer.chat_template = DATED.replace("%d %b %Y", "%Y")
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError) as error:
        unlearn(base, tmp_path / "run")
    assert "the forget records are the same, and their template or tokenizer is not" in str(
        error.value
    )
    assert "has changed" not in str(error.value)


def test_the_command_line_takes_every_part_of_a_rendering(base, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ date }}{{ deep }}|" + DATED.partition("}}")[2])
    forget = write_jsonl(tmp_path / "forget.jsonl", FACTS[:2])
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"template: {tmp_path / 'mine.jinja'}\n"
        "template_kwargs:\n  date: 10 Apr 2025\n  deep: false\n"
    )
    call = ["unlearn", "--model", str(base), "--forget", str(forget), "--method", "NPO",
            "--epochs", "1", "--no-report", "--system-prompt", "Be kind."]  # fmt: skip
    flags = ["--template", str(tmp_path / "mine.jinja"), "--template-kwargs", "date=10 Apr 2025",
             "deep=false"]  # fmt: skip
    assert main([*call, "--output", str(tmp_path / "flags"), *flags]) == 0
    assert main([*call, "--output", str(tmp_path / "yaml"), "--config", str(settings)]) == 0
    one, other = (metadata_of(tmp_path / name) for name in ("flags", "yaml"))
    assert one["rendering"] == other["rendering"]
    assert one["rendering"]["template_kwargs"] == {"date": "10 Apr 2025", "deep": False}
    assert one["data"] == other["data"]
    assert prompts(tmp_path / "flags", tmp_path)[0].startswith("10 Apr 2025False|<system>Be kind.")


def test_raw_text_is_forgotten_in_windows_and_measured_by_its_continuations(base, tmp_path):
    text = " ".join(fact["answer"] for fact in FACTS)
    run = npo_fast.unlearn(
        str(base), forget=[Record((), text)], method="NPO", output=tmp_path / "run",
        loading=ModelOptions(max_length=16), training=TrainSettings(epochs=2, batch_size=4),
    )  # fmt: skip
    data = run.metadata["data"]["forget"]
    assert data["records"] == 1
    assert data["examples"] > 1
    assert data["answer_tokens"] == len(run.tokenizer(text)["input_ids"]) - 1
    answers = run.metadata["before"]["forget"]["answers"]
    assert len(answers) == data["examples"]
    assert all(a["truth"] and a["truth"] in text and a["question"] in text for a in answers)
    assert "without_end" not in run.metadata["before"]["forget"], "a text ends nowhere"
    scores = npo_fast.evaluate(
        run, forget=[Record((), text)], loading=ModelOptions(max_length=16),
        evaluation=npo_fast.EvaluationSettings(max_new_tokens=3),
    )  # fmt: skip
    for _, _, truth in scores.logs["eval_log_forget.json"]["generated_text"]:
        assert len(run.tokenizer(truth)["input_ids"]) <= 3, "compared as far as it was generated"
    with pytest.raises(UserError, match="a text by itself"):
        npo_fast.unlearn(str(base), forget=[Record((), text)], method="DPO",
                         output=tmp_path / "dpo")  # fmt: skip
