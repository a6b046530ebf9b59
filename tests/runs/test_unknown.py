"""``--beta auto``: where the level of unknown answers comes from, and that runs keep it."""

import json
import math
from pathlib import Path

import pytest
import torch

from npo_fast import EvaluationOptions, MethodOptions, RunOptions, TrainSettings, report, unlearn
from npo_fast.errors import Interrupted, UserError
from npo_fast.metrics import FORGET
from npo_fast.runs import Callback
from tests.helpers import FACTS, metadata_of, save_tiny_model

FORGET_ROWS, RETAIN_ROWS = FACTS[6:], FACTS[:6]
HELD_OUT = [{"question": "Where does Kim live?", "answer": "Kim lives at the lake."},
            {"question": "Where does Lou live?", "answer": "Lou lives on a hill."}]  # fmt: skip
SHORT = TrainSettings(epochs=2, lr=1e-3, batch_size=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model that was taught the facts a little, and the one before."""
    from npo_fast import finetune

    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "base")
    finetune(folder / "base", train=FACTS, output=folder / "taught",
             training=TrainSettings(epochs=15, lr=5e-3, batch_size=5))  # fmt: skip
    return folder


def run(models, output, *, method="NPO+RT", beta="auto", training=SHORT, **more):
    return unlearn(models / "taught", forget=FORGET_ROWS, retain=RETAIN_ROWS, output=output,
                   method=MethodOptions(method, beta=beta), training=training, **more)  # fmt: skip


def log_probs(folder, rows):
    """Log-probs of whole answers by plain transformers, and their lengths."""
    from transformers import AutoModelForCausalLM

    from npo_fast.data import Record, Template
    from npo_fast.model.load import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    template = Template(load_tokenizer(str(folder)), "auto", 512)
    sums, lengths = [], []
    for i, row in enumerate(rows):
        example = template.encode(Record((("user", row["question"]),), row["answer"]), i)
        ids, start = torch.tensor(example.input_ids), example.prompt_length
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        each = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[start - 1 :, 0]
        sums.append(float(each.double().sum()))
        lengths.append(len(each))
    return torch.tensor(sums).double(), torch.tensor(lengths).double()


def expected(known, unknown):
    return math.log(19) / float(known.quantile(0.5) - unknown.quantile(0.5))


def test_each_source_of_the_level_gives_the_beta_of_the_rule(models, tmp_path):
    known, lengths = log_probs(models / "taught/model", FORGET_ROWS)
    held_out, of_held_out = log_probs(models / "taught/model", HELD_OUT)
    base, _ = log_probs(models / "base", FORGET_ROWS)
    losses = [0.5 * i + 1 for i in range(len(FORGET_ROWS))]
    log = tmp_path / "logs"
    log.mkdir()
    (log / FORGET).write_text(json.dumps({"avg_gt_loss": losses}))
    retrained = EvaluationOptions(retrained=log)
    levels = {
        "holdout": ({"holdout": HELD_OUT}, lengths * (held_out / of_held_out).quantile(0.5)),
        "base": ({"base_model": models / "base"}, base),
        "number": ({"unknown_log_prob": -77.0}, torch.tensor([-77.0]).double()),
        "log": ({"evaluation": retrained, "holdout": HELD_OUT},
                -lengths * torch.tensor(losses).double()),
    }  # fmt: skip
    for name, (given, unknown) in levels.items():
        facts = run(models, tmp_path / name, **given).metadata
        assert facts["beta"] == pytest.approx(expected(known, unknown), rel=1e-4), name
        assert facts["level"]["reference"] == pytest.approx(float(known.quantile(0.5)), rel=1e-4)
        fixed = unlearn(
            models / "taught", forget=FORGET_ROWS, retain=RETAIN_ROWS, training=SHORT,
            output=tmp_path / f"{name}-fixed", method=MethodOptions("NPO+RT", beta=facts["beta"]),
        )  # fmt: skip
        steps = [(run_folder / "steps.jsonl").read_text().splitlines()
                 for run_folder in (tmp_path / name, fixed.folder)]  # fmt: skip
        losses_of = [[json.loads(line)["loss"] for line in lines] for lines in steps]
        assert losses_of[0] == losses_of[1], f"{name}: not the steps of the same beta as a number"


def test_a_resumed_run_goes_on_with_the_same_beta(models, tmp_path):
    class Stop(Callback):
        def on_step(self, record):
            if record.step == 1:
                raise Interrupted("here", 2)

    options = RunOptions(output=tmp_path / "run", save_every=1)
    with pytest.raises(Interrupted):
        run(models, None, holdout=HELD_OUT, run=options, callbacks=[Stop()])
    first = metadata_of(tmp_path / "run")
    again = run(models, None, holdout=HELD_OUT, run=options).metadata
    whole = run(models, tmp_path / "whole", holdout=HELD_OUT).metadata
    assert again["beta"] == first["beta"] == whole["beta"]
    assert again["level"] == whole["level"]
    assert again["final"]["loss"] == whole["final"]["loss"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "add retrained LOGS, holdout RECORDS, base_model MODEL"),
        ({"method": "SimNPO+RT", "holdout": HELD_OUT}, "SimNPO.RT is not: give a number"),
        ({"method": "DPO", "holdout": HELD_OUT}, "DPO is not"),
        ({"method": "KTO+RT", "holdout": HELD_OUT}, "KTO.RT is not"),
        ({"unknown_log_prob": 1.0}, "must be a log-prob, 0 or less, got 1.0"),
        ({"unknown_log_prob": math.nan}, "must be a log-prob"),
        ({"unknown_log_prob": -0.001}, "there is nothing to forget"),
        ({"beta": "automatic"}, "beta must be"),
    ],
)
def test_what_gives_no_beta_is_refused(models, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        run(models, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


TEXTS = [{"text": f"A long time ago {row['answer']}"} for row in FACTS]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"holdout": [*HELD_OUT, FORGET_ROWS[0]]}, "1 of 3 holdout records are forget records too"),
        ({"holdout": RETAIN_ROWS[:2]}, "2 of 2 holdout records are retain records too"),
        ({"holdout": TEXTS}, "holdout holds texts and forget questions"),
        ({"holdout": [*HELD_OUT, TEXTS[9]]}, "holdout holds texts and forget questions"),
        ({"base_model": "./nowhere"}, "base_model.*no model folder"),
        ({"evaluation": EvaluationOptions(retrained=Path("no-log"))}, "no evaluation log 'no-log'"),
    ],
)
def test_what_cannot_tell_the_level_is_refused_in_a_dry_run(models, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        run(models, None, run=RunOptions(output=tmp_path / "run", dry_run=True), **given)


def test_a_base_model_in_memory_keeps_its_attention(models, tmp_path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(models / "base")
    attention = base.config._attn_implementation
    run(models, tmp_path / "run", base_model=base)
    assert base.config._attn_implementation == attention


def test_the_card_says_what_beta_was_found(models, tmp_path):
    made = run(models, tmp_path / "run", holdout=HELD_OUT)
    card = (made.folder / "model/README.md").read_text()
    assert f"| beta | auto: {made.metadata['beta']:.4g} |" in card


def test_a_log_of_other_records_is_refused(models, tmp_path):
    (tmp_path / FORGET).write_text(json.dumps({"avg_gt_loss": [1.0, 2.0]}))
    with pytest.raises(UserError, match="has 2 forget items and forget 4: evaluate"):
        run(models, tmp_path / "run", evaluation=EvaluationOptions(retrained=tmp_path / FORGET))


def test_the_card_and_the_report_say_what_beta_was(models, tmp_path):
    made = run(models, tmp_path / "run", unknown_log_prob=-60.0)
    found = f"{made.metadata['beta']:.4g}"
    assert f"| beta | auto: {found} |" in (tmp_path / "run/model/README.md").read_text()
    (row,) = report(made, output=tmp_path / "page.html").rows
    assert f"beta {made.metadata['beta']:g}" in row["settings"]


def test_the_level_is_in_the_verdict_of_any_method(models, tmp_path):
    made = run(models, tmp_path / "run", method="SimNPO+RT", beta=None, unknown_log_prob=-60.0)
    assert "never known -60" in str(made.verdict)
