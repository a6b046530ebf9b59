"""Methods that compare whole distributions with the model's as it was, in the training loop."""

from dataclasses import replace

import pytest
import torch

from npo_fast.cli import main
from npo_fast.data import TokenizedExample, pack
from npo_fast.errors import UserError
from npo_fast.methods import Coefficients, build_method
from npo_fast.runs.padding import padded_weights
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs, train
from npo_fast.trainer.order import step_batches
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import (
    FACTS,
    read_jsonl,
    run_method,
    save_tiny_model,
    slow_but,
    small_lm,
    sources,
    write_jsonl,
)


def whole_kl(lm, reference, sequences, everywhere=False, labels_lowered=0.0):
    """Token mean of KL(reference || model) from Hugging Face's own logits."""
    total, count = 0.0, 0
    for s in sequences:
        ids = torch.tensor([s.input_ids])
        with torch.no_grad(), lm.generating() as model, reference.generating() as ref:
            log_p, ref_z = model(ids).logits[0].log_softmax(-1), ref(ids).logits[0]
        rows = torch.arange(len(s.input_ids))
        if not everywhere:
            rows = rows[s.prompt_length - 1 : -1]
            ref_z[rows, ids[0, rows + 1]] -= labels_lowered
        log_ref = ref_z.log_softmax(-1)
        kl = (log_ref.exp() * (log_ref - log_p)).sum(-1)[rows]
        total, count = total + float(kl.sum()), count + len(rows)
    return total / count


@torch.no_grad()
def scale(lm):
    for parameter in lm.model.parameters():
        parameter.mul_(1.1)


@pytest.mark.parametrize(
    "method",
    slow_but(["NPO+KL", "GA+forgetKL"], ["GA+KL", "NPO+KL", "DPO+KL", "KTO+KL", "GA+forgetKL"]),
)
@pytest.mark.parametrize("kl_positions", ["answer", "all"])
def test_a_kl_is_nothing_before_the_first_step_and_positive_after(method, kl_positions):
    lm = small_lm()
    terms = build_method(method, kl_positions=kl_positions)
    references = reference_log_probs(lm, sources(), terms, 2048)
    cache = reference_cache_for(terms, lm, sources(), 2048)
    settings = TrainSettings(epochs=3, batch_size=7, lr=3e-3)
    first, *_, last = train(lm, sources(), terms, settings, references, cache)
    (name,) = (term.name for term in terms if term.name.endswith("KL"))
    assert abs(first.terms[name]) < 1e-7
    assert last.terms[name] > 1e-4


@pytest.mark.parametrize(
    ("method", "kl_positions", "source"),
    [
        ("GA+KL", "answer", "retain"),
        ("GA+KL", "all", "retain"),
        ("GA+forgetKL", "answer", "forget"),
        ("UNDIAL", "answer", "forget"),
    ],
)
def test_the_term_is_that_of_hugging_faces_logits(method, kl_positions, source):
    lm, start = small_lm(), small_lm()
    data = sources()
    data["retain"] = data["retain"][:7]  # a step of 7 sees all of both
    term = build_method(method, Coefficients(), kl_positions)[-1]
    cache = reference_cache_for((term,), lm, data, 2048)
    scale(lm)
    settings = TrainSettings(epochs=1, batch_size=7, micro_batch_tokens=25)
    (record,) = train(lm, data, (term,), settings, {}, cache)
    before = small_lm()  # the step has changed the other
    scale(before)
    lowered = 10.0 if method == "UNDIAL" else 0.0
    expected = whole_kl(before, start, data[source], kl_positions == "all", lowered)
    assert record.terms[term.name] == pytest.approx(expected, rel=1e-4)
    assert record.loss == pytest.approx((-1 if method == "GA+forgetKL" else 1) * expected, rel=1e-4)


def test_a_record_has_log_probs_where_every_term_is_a_kl():
    lm, data = small_lm(), sources()
    _, (record,) = run_method("UNDIAL", TrainSettings(epochs=1, batch_size=7), lm=lm)
    (batch,) = pack(data["forget"], 2048)
    expected = float(small_lm().log_probs(batch).sum()) / 7
    assert record.log_probs["forget"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_kl_on_retain_data_keeps_the_model_nearer_to_what_it_was():
    settings = TrainSettings(epochs=8, batch_size=7, lr=3e-3)
    start, retain = small_lm(), sources()["retain"]
    alone, _ = run_method("NPO", settings)
    kept, records = run_method("NPO+KL", settings)
    assert whole_kl(kept, start, retain) < 0.7 * whole_kl(alone, start, retain)
    assert records[-1].log_probs["forget"] < records[0].log_probs["forget"]


@pytest.mark.slow
def test_negative_kl_drives_the_forget_distribution_away():
    settings = TrainSettings(epochs=8, batch_size=7, lr=1e-3)
    start, forget = small_lm(), sources()["forget"]
    without, _ = run_method("GA+forgetKL", settings, kl=0.0)
    with_, _ = run_method("GA+forgetKL", settings, kl=3.0)
    assert whole_kl(with_, start, forget) > whole_kl(without, start, forget)


def test_undial_nears_a_reference_that_likes_its_labels_less():
    settings = TrainSettings(epochs=20, batch_size=7, lr=3e-3)
    _, records = run_method("UNDIAL", settings, gamma=3.0)
    assert records[-1].terms["UNDIAL"] < 0.7 * records[0].terms["UNDIAL"]
    assert records[-1].log_probs["forget"] < records[0].log_probs["forget"]


def test_all_positions_are_for_methods_with_a_kl():
    with pytest.raises(UserError, match=r"UNDIAL has no KL .*GA\+KL, GA\+forgetKL, NPO\+KL"):
        build_method("UNDIAL", kl_positions="all")
    assert build_method("NPO+KL", kl_positions="all")[1].positions == "all"
    with pytest.raises(UserError, match="kl coefficient must be 0 or more"):
        build_method("NPO+KL", Coefficients(kl=-1.0))
    with pytest.raises(UserError, match=r"demotion \(gamma\) must be 0 or more"):
        build_method("UNDIAL", Coefficients(gamma=-1.0))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "model")
    write_jsonl(folder / "forget.jsonl", FACTS[:4])
    write_jsonl(folder / "retain.jsonl", FACTS[4:])
    return folder


def unlearn(home, output, *more):
    return main(
        ["unlearn", "--model", str(home / "model"), "--forget", str(home / "forget.jsonl"),
         "--retain", str(home / "retain.jsonl"), "--output", str(output), "--epochs", "2",
         "--batch-size", "4", "--lr", "1e-3", "--no-report", *more]
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_line_runs_kl_and_reuses_a_cache(home, tmp_path, capsys):
    cache = tmp_path / "reference"
    options = ("--method", "NPO+KL", "--kl-coefficient", "2", "--reference-cache", str(cache))
    assert unlearn(home, tmp_path / "one", *options) == 0
    index, head = (cache / "states" / name for name in ("reference.json", "head.safetensors"))
    written = index.stat().st_mtime_ns
    assert unlearn(home, tmp_path / "two", *options) == 0
    assert index.stat().st_mtime_ns == written
    assert unlearn(home, tmp_path / "three", *options[:4]) == 0
    steps = [
        [step["loss"] for step in read_jsonl(tmp_path / name / "steps.jsonl")]
        for name in ("one", "two", "three")
    ]
    assert steps[0] == steps[1] == steps[2]
    capsys.readouterr()
    assert unlearn(home, tmp_path / "four", *options, "--kl-positions", "all") == 2
    assert "was made with another positions" in capsys.readouterr().err
    head.write_bytes(head.read_bytes()[:-8])
    assert unlearn(home, tmp_path / "five", *options) == 2
    assert "head.safetensors is damaged" in capsys.readouterr().err
    assert not (tmp_path / "five").exists()


def test_a_cache_for_a_method_that_has_no_use_for_it_is_refused(home, tmp_path, capsys):
    options = ("--method", "SimNPO+RT", "--reference-cache", str(tmp_path / "reference"))
    assert unlearn(home, tmp_path / "run", *options) == 2
    assert "SimNPO+RT compares with no reference; leave out" in capsys.readouterr().err


def test_other_answers_that_the_method_does_not_read_are_refused(home, tmp_path, capsys):
    for flag in ("--idk", "--alternate"):
        assert unlearn(home, tmp_path / "run", "--method", "NPO", flag, "answers.jsonl") == 2
        assert f"NPO reads no such answers; leave out {flag}" in capsys.readouterr().err


def test_a_run_says_what_its_kl_weighs_beside_one_over_padding():
    """Two retain batches of 2: 4 + 6 and 5 + 9 tokens, of which 3, 4, 3 and 5 are answers."""
    lengths = {0: (4, 1), 1: (6, 2), 2: (5, 2), 3: (9, 4)}
    retain = [TokenizedExample((5,) * n, prompt, i) for i, (n, prompt) in lengths.items()]
    data = {"retain": retain, "forget": retain}
    settings = TrainSettings(batch_size=2)
    batches = step_batches(data, ("forget",), replace(settings, epochs=1))
    longest = sum(2 * max(len(s.input_ids) for s in batch["retain"]) for batch in batches)
    (line,) = padded_weights(build_method("NPO+KL", Coefficients(kl=3.0)), data, settings)
    assert f"longest (open-unlearning) {longest / 15:.3g} times less" in line
    assert "padded to 500 (the NPO paper's code) 133 times less" in line
    assert line.endswith(f"as much as with --kl-coefficient {45 / longest:.3g} or 0.0225")
    (line,) = padded_weights(build_method("NPO+KL", kl_positions="all"), data, settings)
    assert f"longest (open-unlearning) {longest / 24:.3g} times less" in line
    (line,) = padded_weights(build_method("UNDIAL+RT"), data, settings)
    assert "500" not in line
    assert "with --forget-coefficient" in line
    assert padded_weights(build_method("NPO+RT"), data, settings) == []
