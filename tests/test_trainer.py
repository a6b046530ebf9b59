"""The loop does what it says: whole-batch losses, references, order, and a stop before harm."""

import dataclasses
import math

import pytest
import torch

from npo_fast.data import Sequence
from npo_fast.errors import NonFiniteError, UserError
from npo_fast.methods import FINETUNE, METHODS, Coefficients, build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import reference_log_probs, train
from npo_fast.trainer.order import step_batches
from npo_fast.trainer.settings import TrainSettings
from tests.conftest import VOCABULARY, tiny_model


def sequences(count: int, seed: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        length = int(torch.randint(4, 14, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        out.append(Sequence(tuple(ids), 1 + i % 3, i))
    return out


def sources() -> dict[str, list[Sequence]]:
    return {"forget": sequences(7, 1), "retain": sequences(11, 2)}


def small_lm() -> CausalLM:
    torch.manual_seed(0)
    model = tiny_model("Llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return CausalLM(model, probe=False)


def run(method: str, settings: TrainSettings, lm: CausalLM | None = None, **coefficients):
    lm = lm or small_lm()
    terms = build_method(method, Coefficients(**coefficients))
    references = reference_log_probs(lm, sources(), terms, settings.micro_batch_tokens)
    return lm, list(train(lm, sources(), terms, settings, references))


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_memory_and_not_the_losses(method):
    settings = TrainSettings(epochs=2, batch_size=4, lr=1e-3)
    _, whole = run(method, settings)
    _, parts = run(method, dataclasses.replace(settings, micro_batch_tokens=16))
    assert len(whole) == len(parts) == 4
    for one, other in zip(whole, parts, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


def test_the_first_npo_step_starts_at_the_reference():
    """r is 0 before any step, so the loss is (2 / beta) log 2 whatever the model."""
    _, records = run("NPO", TrainSettings(epochs=1, batch_size=7), beta=0.25)
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


@pytest.mark.parametrize("method", ["GA", "NPO", "SimNPO", "GA+RT", "NPO+RT"])
def test_every_method_lowers_the_forget_log_probs(method):
    _, records = run(method, TrainSettings(epochs=8, batch_size=7, lr=3e-3))
    assert records[-1].log_probs["forget"] < records[0].log_probs["forget"]


def test_retain_data_keeps_the_retain_log_probs_up():
    settings = TrainSettings(epochs=8, batch_size=7, lr=3e-3)
    _, alone = run("NPO", settings)
    lm, _ = run("NPO", settings)
    without = reference_log_probs(lm, sources(), _on_retain(), 2048)["retain"].sum()
    lm, kept = run("NPO+RT", settings)
    with_ = reference_log_probs(lm, sources(), _on_retain(), 2048)["retain"].sum()
    assert with_ > without
    assert "retain NLL" in kept[0].terms
    assert "retain NLL" not in alone[0].terms


def _on_retain():
    (term,) = build_method("NPO")
    return (dataclasses.replace(term, source="retain"),)


def test_the_same_seed_gives_the_same_run_bit_for_bit():
    settings = TrainSettings(epochs=2, batch_size=4, lr=1e-3, seed=5)
    (a, one), (b, two) = run("NPO+RT", settings), run("NPO+RT", settings)
    assert [r.loss for r in one] == [r.loss for r in two]
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)
    _, other = run("NPO+RT", dataclasses.replace(settings, seed=6))
    assert [r.loss for r in one] != [r.loss for r in other]


def test_an_epoch_sees_every_forget_sequence_once_and_as_many_to_retain():
    data = sources()
    batches = list(step_batches(data, "forget", batch_size=3, epochs=2, seed=0))
    assert [len(b["forget"]) for b in batches] == [3, 3, 1, 3, 3, 1]
    assert all(len(b["forget"]) == len(b["retain"]) for b in batches)
    for epoch in (batches[:3], batches[3:]):
        seen = sorted(s.index for b in epoch for s in b["forget"])
        assert seen == list(range(7))
    first_eleven = [s.index for b in batches for s in b["retain"]][:11]
    assert sorted(first_eleven) == list(range(11)), "no repetition until all were seen"


def test_the_learning_rate_rises_over_the_first_epoch_and_falls_to_zero():
    _, records = run("GA", TrainSettings(epochs=5, batch_size=4, lr=1.0))
    rates = [r.lr for r in records]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 8)


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
    with pytest.raises(UserError, match="retain coefficient"):
        build_method("NPO+RT", Coefficients(retain=-1))
