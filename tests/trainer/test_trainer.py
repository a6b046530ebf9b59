"""The loop does what it says: whole-batch losses, references, order, and a stop before harm."""

import dataclasses
import math

import pytest
import torch

from npo_fast.data import micro_batches, pack
from npo_fast.errors import NonFiniteError, UserError
from npo_fast.losses import CEU, TNPO, SatImp, SimNPO
from npo_fast.methods import (
    COEFFICIENTS,
    FINETUNE,
    METHODS,
    Coefficients,
    build_method,
    coefficients_of,
)
from npo_fast.ops import segment_sum
from npo_fast.trainer.loop import reference_log_probs, train
from npo_fast.trainer.order import interleave, step_batches
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.step import with_baselines
from tests.helpers import run_method, sequences, slow_but, small_lm, sources


@pytest.mark.parametrize("method", slow_but(["DPO+KL"], METHODS))
def test_micro_batches_change_memory_and_not_the_losses(method):
    settings = TrainSettings(epochs=2, batch_size=4, lr=1e-3)
    _, whole = run_method(method, settings)
    _, parts = run_method(method, dataclasses.replace(settings, micro_batch_tokens=16))
    assert len(whole) == len(parts) == 4
    for one, other in zip(whole, parts, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


@pytest.mark.parametrize("method", slow_but(["NPO+RT"], METHODS))
def test_two_runs_of_a_method_are_the_same_to_the_bit(method):
    settings = TrainSettings(epochs=1, batch_size=4, lr=1e-3, micro_batch_tokens=40)
    (a, one), (b, two) = run_method(method, settings), run_method(method, settings)
    assert [r.loss for r in one] == [r.loss for r in two]
    assert len(one) == 2
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_idk_rt_is_one_token_mean_over_refusals_and_retain_data():
    lm, data = small_lm(), sources()
    settings = TrainSettings(epochs=1, batch_size=7)
    (batch,) = step_batches({name: data[name] for name in ("idk", "retain")}, ("idk",), settings)
    together = [
        dataclasses.replace(s, index=i) for i, s in enumerate(batch["idk"] + batch["retain"])
    ]
    (expected,) = train(lm, {"train": together}, FINETUNE, TrainSettings(epochs=1, batch_size=14))
    _, (record,) = run_method("IDK+RT", TrainSettings(epochs=1, batch_size=7))
    assert record.loss == pytest.approx(expected.loss, rel=1e-5)
    assert record.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)


def test_the_baseline_of_kto_is_that_of_the_whole_step():
    """Mean over all refusals of the step, whatever the micro-batches; 0 at the reference."""
    lm, data = small_lm(), sources()
    (term,) = build_method("KTO", Coefficients(beta=0.3))
    references = reference_log_probs(lm, data, (term,), 2048)
    for tokens in (16, 2048):
        (at_start,) = with_baselines(
            lm, [term], {"idk": micro_batches(data["idk"], tokens)}, references
        )
        assert at_start.loss.z == pytest.approx(0.0, abs=1e-5)
    moved = {**references, "idk": references["idk"] - torch.arange(7.0)}
    for tokens in (16, 2048):
        (later,) = with_baselines(lm, [term], {"idk": micro_batches(data["idk"], tokens)}, moved)
        assert later.loss.z == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize("tokens", [12, 30, 2048])
def test_pairs_stay_whole_and_in_order_in_every_micro_batch(tokens):
    data = sources()
    batch = interleave(data, ("idk", "forget"))
    seen = []
    for micro in pack(batch, tokens, group=2):
        assert micro.sequences % 2 == 0
        assert micro.indices[::2] == micro.indices[1::2], "answers to the same question"
        lengths = [
            (len(data["idk"][i].input_ids), len(data["forget"][i].input_ids))
            for i in micro.indices[::2]
        ]
        assert list(micro.lengths) == [n for pair in lengths for n in pair]
        seen += micro.indices[::2]
    assert sorted(seen) == list(range(7))


def test_dpo_sees_each_refusal_beside_its_own_question():
    data = sources()
    batches = step_batches(data, ("forget", "idk"), TrainSettings(batch_size=3, epochs=2))
    for batch in batches:
        assert [s.index for s in batch["forget"]] == [s.index for s in batch["idk"]]


def test_answers_that_do_not_belong_to_the_questions_are_refused():
    data = {**sources(), "idk": sequences(6, 3)}
    terms = build_method("DPO")
    with pytest.raises(UserError, match="one answer of every kind, got 7 in forget, 6 in idk"):
        next(train(small_lm(), data, terms, TrainSettings(), {}))


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("DPO", 2 / 0.25 * math.log(2)),
        ("AltPO", 2 / 0.25 * math.log(2)),
        ("KTO", 1 + 2 / 0.25 * math.log(2)),
    ],
)
def test_every_comparison_starts_at_the_reference(method, value):
    _, records = run_method(method, TrainSettings(epochs=1, batch_size=7), beta=0.25)
    assert records[0].terms[method] == pytest.approx(value, rel=1e-5)


def test_tnpo_starts_as_gradient_ascent():
    """At the reference each token's weight is 1."""
    settings = TrainSettings(epochs=1, batch_size=7)
    _, (tnpo,) = run_method("TNPO", settings)
    _, (ga,) = run_method("GA", settings)
    assert tnpo.loss == pytest.approx(ga.loss, rel=1e-5)
    assert tnpo.grad_norm == pytest.approx(ga.grad_norm, rel=1e-4)


@pytest.mark.parametrize("method", ["NPO", "TNPO", "DPO"])
def test_the_reference_of_the_same_pack_is_exact(method):
    """r is exactly 0 before any step: the same kernels on the same pack."""
    lm, data = small_lm(), sources()
    (term,) = build_method(method)
    references = reference_log_probs(lm, data, (term,), 2048)
    batch = next(pack(data["forget"], 2048))
    found = lm.log_probs(batch)
    expected = [references["forget"][i] for i in batch.indices]
    if term.loss.reference == "token":
        assert torch.equal(found, torch.cat(expected))
    else:
        assert torch.equal(segment_sum(found, batch.answer_cu_seqlens), torch.stack(expected))


def test_alternating_steps_take_turns_on_each_batch():
    settings = TrainSettings(epochs=2, batch_size=4, lr=1e-3, schedule="alternating")
    _, records = run_method("NPO+RT", settings)
    assert [list(r.terms) for r in records] == [["NPO"], ["retain NLL"]] * 4
    assert [list(r.log_probs) for r in records[:2]] == [["forget"], ["retain"]]
    assert records[-1].steps == 8
    assert records[-1].epoch == 2.0
    _, summed = run_method("NPO+RT", dataclasses.replace(settings, schedule="summed"))
    assert records[0].terms["NPO"] == pytest.approx(summed[0].terms["NPO"], rel=1e-5)
    with pytest.raises(UserError, match="takes turns between forget and retain data"):
        run_method("NPO", settings)


def test_the_first_npo_step_starts_at_the_reference():
    """r is 0 before any step, so the loss is (2 / beta) log 2 whatever the model."""
    _, records = run_method("NPO", TrainSettings(epochs=1, batch_size=7), beta=0.25)
    assert records[0].terms["NPO"] == pytest.approx(2 / 0.25 * math.log(2), rel=1e-4)


def test_the_fine_tuning_loss_is_that_of_hugging_face():
    lm = small_lm()
    data = sequences(5, 3)
    total = tokens = 0
    for s in data:
        ids = torch.tensor([s.input_ids])
        labels = ids.clone()
        labels[:, : s.prompt_length] = -100
        with lm.generating() as model:
            total += float(model(input_ids=ids, labels=labels).loss) * s.answer_length
        tokens += s.answer_length
    (record,) = train(lm, {"train": data}, FINETUNE, TrainSettings(epochs=1, batch_size=5))
    assert record.loss == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize(
    "method", slow_but(["NPO+RT"], [m for m in METHODS if m not in ("IDK+RT", "RMU")])
)
def test_every_method_lowers_the_forget_log_probs(method):
    _, records = run_method(method, TrainSettings(epochs=8, batch_size=7, lr=3e-3))
    assert records[-1].log_probs["forget"] < records[0].log_probs["forget"]


def test_retain_data_keeps_the_retain_log_probs_up():
    settings = TrainSettings(epochs=8, batch_size=7, lr=3e-3)
    _, alone = run_method("NPO", settings)
    lm, _ = run_method("NPO", settings)
    without = reference_log_probs(lm, sources(), _on_retain(), 2048)["retain"].sum()
    lm, kept = run_method("NPO+RT", settings)
    with_ = reference_log_probs(lm, sources(), _on_retain(), 2048)["retain"].sum()
    assert with_ > without
    assert "retain NLL" in kept[0].terms
    assert "retain NLL" not in alone[0].terms


def _on_retain():
    (term,) = build_method("NPO")
    return (dataclasses.replace(term, source="retain"),)


def test_the_same_seed_gives_the_same_run_bit_for_bit():
    settings = TrainSettings(epochs=2, batch_size=4, lr=1e-3, seed=5)
    (a, one), (b, two) = run_method("NPO+RT", settings), run_method("NPO+RT", settings)
    assert [r.loss for r in one] == [r.loss for r in two]
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)
    _, other = run_method("NPO+RT", dataclasses.replace(settings, seed=6))
    assert [r.loss for r in one] != [r.loss for r in other]


def test_an_epoch_sees_every_forget_sequence_once_and_as_many_to_retain():
    data = sources()
    batches = list(step_batches(data, ("forget",), TrainSettings(batch_size=3, epochs=2)))
    assert [len(b["forget"]) for b in batches] == [3, 3, 1, 3, 3, 1]
    assert all(len(b["forget"]) == len(b["retain"]) for b in batches)
    for epoch in (batches[:3], batches[3:]):
        seen = sorted(s.index for b in epoch for s in b["forget"])
        assert seen == list(range(7))
    first_eleven = [s.index for b in batches for s in b["retain"]][:11]
    assert sorted(first_eleven) == list(range(11)), "no repetition until all were seen"


def test_the_learning_rate_rises_over_the_first_epoch_and_falls_to_zero():
    _, records = run_method("GA", TrainSettings(epochs=4, batch_size=3, lr=1.0))
    rates = [r.lr for r in records]  # 7 questions: two whole batches an epoch, and a smaller one
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 10)


def test_a_non_finite_step_stops_before_it_touches_the_weights():
    lm = small_lm()
    terms = build_method("GA+RT")
    steps = train(lm, sources(), terms, TrainSettings(epochs=3, batch_size=7, lr=1e-3))
    next(steps)
    good = {name: p.clone() for name, p in lm.model.named_parameters()}

    def poison(module, args, out):
        out.last_hidden_state = out.last_hidden_state * torch.nan
        return out

    lm.decoder.register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is nan.*forget records \d"):
        next(steps)
    assert all(torch.equal(good[n], p) for n, p in lm.model.named_parameters())


@pytest.mark.parametrize("bad", [{"lr": 0}, {"epochs": -1}, {"batch_size": 0}, {"lr": math.nan}])
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        TrainSettings(**bad)


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(UserError, match=r"unknown method 'NPO\+KT'; did you mean NPO\+RT\?"):
        build_method("NPO+KT")
    assert build_method("npo_rt")[1].name == "retain NLL"
    with pytest.raises(UserError, match="beta must be positive"):
        build_method("NPO", Coefficients(beta=-1))
    with pytest.raises(UserError, match="retain coefficient must be 0 or more"):
        build_method("NPO+RT", Coefficients(retain=-1))


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("GA", {"beta": 0.1}, r"GA has no beta; these have: NPO, NPO\+RT, NPO\+KL"),
        ("NPO", {"retain": 2.0}, r"NPO has no retain coefficient; these have: GA\+RT, IDK\+RT"),
        ("NPO+RT", {"kl": 2.0}, r"NPO\+RT has no kl coefficient; these have: GA\+KL"),
        ("NPO", {"delta": 0.0}, r"NPO has no delta; these have: SimNPO, SimNPO\+RT$"),
        ("CEU+RT", {"beta1": 1.0}, r"CEU\+RT has no beta1; these have: SatImp, SatImp\+RT$"),
    ],
)
def test_a_coefficient_that_a_method_does_not_have_is_an_error(method, given, message):
    with pytest.raises(UserError, match=message):
        build_method(method, Coefficients(**given))


@pytest.mark.parametrize("method", METHODS)
def test_every_coefficient_of_a_method_reaches_its_terms(method):
    defaults = build_method(method)
    for name, value in coefficients_of(method).items():
        changed = build_method(method, Coefficients(**{name: (value or 0) + 2}))
        assert changed != defaults, name
        same = build_method(method, Coefficients(**{name: value}))
        assert same == defaults, name


def test_the_preset_has_the_defaults_of_open_unlearning_and_what_is_given_wins():
    def loss_of(method, **given):
        term = build_method(method, Coefficients(**given), preset="open-unlearning")[0]
        return term.loss, term.coefficient

    assert loss_of("SimNPO+RT") == (SimNPO(4.5, 0.0), 0.125)
    assert loss_of("SatImp+RT") == (SatImp(5.0, 1.0), 0.1)
    assert loss_of("TNPO") == (TNPO(4.0, 1e-5), 1.0)
    assert loss_of("CEU") == (CEU(1), 1.0)
    assert loss_of("SimNPO", beta=3.0) == (SimNPO(3.0, 0.0), 0.125)
    assert loss_of("SatImp", forget=1.0) == (SatImp(5.0, 1.0), 1.0)
    for method in ("NPO+RT", "DPO+RT", "WGA+RT", "UNDIAL", "GA+RT", "NPO+KL"):  # as they are here
        assert build_method(method, preset="open-unlearning") == build_method(method)
    retain = build_method("SimNPO+RT", preset="open-unlearning")[1]
    assert retain.coefficient == 1.0
    with pytest.raises(UserError, match="unknown preset 'tofu'; known: open-unlearning"):
        build_method("NPO", preset="tofu")


def test_ceu_is_a_mean_cross_entropy_over_the_tokens_that_are_not_skipped():
    lm, data, total, count = small_lm(), sources()["forget"], 0.0, 0
    for s in data:
        ids = torch.tensor([s.input_ids])
        with torch.no_grad(), lm.generating() as model:
            logits = model(ids).logits[0, s.prompt_length : -1]  # the first answer token left out
        labels = ids[0, s.prompt_length + 1 :, None]
        target = logits.scatter(1, labels, -torch.inf).softmax(-1)
        total -= float((target * logits.log_softmax(-1)).sum())
        count += len(labels)
    _, (record,) = run_method("CEU", TrainSettings(epochs=1, batch_size=7), skip_first=1)
    assert record.terms["CEU"] == record.loss == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(UserError, match="skip_first 99 leaves no token of any forget answer"):
        run_method("CEU", TrainSettings(epochs=1), skip_first=99)


def test_every_coefficient_is_declared_once_and_its_help_names_the_defaults():
    assert set(COEFFICIENTS) == {name for method in METHODS for name in coefficients_of(method)}
    beta, retain = COEFFICIENTS["beta"], COEFFICIENTS["retain"]
    assert beta.help.startswith(
        'Inverse temperature (WGA: exponent). Default: 0.1; SimNPO 2.5, WGA 1. "auto" (NPO): '
    )
    assert (beta.flag, retain.flag) == ("beta", "retain_coefficient")
    assert (beta.label, retain.label) == ("beta", "retain coefficient")
    assert retain.defaults == {"held states": 1.0, "retain NLL": 1.0}
    assert beta.defaults["SimNPO"] == coefficients_of("SimNPO+RT")["beta"]
