"""Sharpness-aware steps: the forget gradient of weights nearby, and weights that come back."""

import dataclasses
import math
import re
import warnings
from pathlib import Path

import pytest
import torch

from npo_fast.cli import main
from npo_fast.errors import NonFiniteError, OutOfMemory, UserError
from npo_fast.methods import FINETUNE, Coefficients, build_method
from npo_fast.model.adapters import add_lora
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import check_settings, reference_cache_for, reference_log_probs, train
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.state import TrainState
from tests.helpers import calm_model, dropout_lm, limit_memory, slow_but, small_lm, sources

RHO = 0.05
SETTINGS = TrainSettings(
    epochs=1, batch_size=7, lr=1e-2, warmup_steps=0, weight_decay=0.0, max_grad_norm=math.inf,
    sharpness_rho=RHO,
)  # fmt: skip


def with_rho(settings: TrainSettings, rho: float) -> TrainSettings:
    return dataclasses.replace(settings, sharpness_rho=rho)


def steps(lm: CausalLM, settings: TrainSettings, method: str = "NPO+RT", state=None):
    terms = build_method(method)
    references = reference_log_probs(lm, sources(), terms, 2048)
    cache = reference_cache_for(terms, lm, sources(), 2048)
    return train(lm, sources(), terms, settings, references, cache, state)


def weights(lm: CausalLM) -> list[torch.Tensor]:
    return [p.detach().clone() for p in lm.model.parameters()]


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def plain_loss(model, name: str, beta: float, references: dict[str, list[float]]):
    """Of NPO on all forget sequences, or the token mean of the NLL of the first retain sequences,
    in the logits of transformers."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for example in sources()[name][:7]:
        ids = torch.tensor([example.input_ids])
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        log_probs = logits.gather(1, ids[0, 1:, None])[example.prompt_length - 1 :, 0]
        ratio = log_probs.sum() - references.get(name, [0.0] * 7)[example.index]
        loss = torch.nn.functional.softplus(beta * ratio) * 2 / beta
        total = total + (loss / 7 if name == "forget" else -log_probs.sum())
        tokens += len(log_probs)
    return total if name == "forget" else total / tokens


def test_a_step_is_that_of_plain_pytorch_in_fp64():
    """From a model that the reference has left behind, so that NPO's weights are not all 1."""
    beta, retain = 0.3, 2.0
    torch.manual_seed(0)
    lm = CausalLM(calm_model().double(), probe=False)
    terms = build_method("NPO+RT", Coefficients(beta=beta, retain=retain))
    data = {**sources(), "retain": sources()["retain"][:7]}
    references = reference_log_probs(lm, data, terms, 2048)
    numbers = {"forget": references["forget"].tolist()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lm.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))

    model = lm.model
    start = weights(lm)
    parameters = list(model.parameters())
    with lm.generating():  # the attention that it came with
        at_start = [plain_loss(model, name, beta, numbers) for name in ("forget", "retain")]
        up = torch.autograd.grad(at_start[0], parameters, retain_graph=True)
        kept = torch.autograd.grad(at_start[1], parameters)
        norm = math.sqrt(sum(float((g**2).sum()) for g in up))
        with torch.no_grad():
            for p, g in zip(parameters, up, strict=True):
                p += RHO * g / norm
        above = torch.autograd.grad(plain_loss(model, "forget", beta, numbers), parameters)
        with torch.no_grad():
            for p, w in zip(parameters, start, strict=True):
                p.copy_(w)
    gradient = [f + retain * r for f, r in zip(above, kept, strict=True)]
    ordinary = [f + retain * r for f, r in zip(up, kept, strict=True)]

    (record,) = train(lm, data, terms, dataclasses.replace(SETTINGS, lr=1e-3), references)
    expected_norm = math.sqrt(sum(float((g**2).sum()) for g in gradient))
    assert record.grad_norm == pytest.approx(expected_norm, rel=1e-9)
    other = math.sqrt(sum(float((g**2).sum()) for g in ordinary))
    assert abs(other - expected_norm) > 1e-3 * expected_norm, "and not that of an ordinary step"
    expected = float((at_start[0] + retain * at_start[1]).detach())
    assert record.loss == pytest.approx(expected, rel=1e-9)
    for p, w, g in zip(weights(lm), start, gradient, strict=True):  # AdamW's first step
        torch.testing.assert_close(p, w - 1e-3 * g / (g.abs() + 1e-8), rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", slow_but(["KTO+RT"], ["KTO+RT", "NPO+KL", "IDK+RT", "GA"]))
def test_without_room_to_move_it_is_the_ordinary_step_to_the_bit(method):
    """With dropout: both passes over the forget data draw the same numbers."""
    settings = dataclasses.replace(SETTINGS, batch_size=4, micro_batch_tokens=30, epochs=2)
    one, other = dropout_lm(), dropout_lm()
    ordinary = list(steps(one, with_rho(settings, 0.0), method))
    found = list(steps(other, with_rho(settings, 1e-30), method))
    assert [r.loss for r in found] == [r.loss for r in ordinary]
    assert [r.grad_norm for r in found] == [r.grad_norm for r in ordinary]
    assert_same(weights(one), weights(other))


@pytest.mark.parametrize("method", slow_but(["KTO+RT"], ["KTO+RT", "NPO+KL", "DPO+RT", "TNPO+RT"]))
def test_micro_batches_change_memory_and_not_the_step(method):
    settings = dataclasses.replace(SETTINGS, sharpness_rho=0.5)
    whole, parts, ordinary = small_lm(), small_lm(), small_lm()
    (expected,) = steps(whole, settings, method)
    (found,) = steps(parts, dataclasses.replace(settings, micro_batch_tokens=14), method)
    (other,) = steps(ordinary, with_rho(settings, 0.0), method)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert abs(other.grad_norm / expected.grad_norm - 1) > 1e-2, "the perturbation matters here"
    assert (other.loss, other.log_probs) == (expected.loss, expected.log_probs), "measured at w"


def test_only_forgetting_is_perturbed_in_alternating_steps():
    settings = dataclasses.replace(SETTINGS, schedule="alternating")
    lm = small_lm()
    forget, retain = steps(lm, dataclasses.replace(settings, lr=1e-30))
    plain_forget, plain_retain = steps(small_lm(), with_rho(settings, 0.0))
    assert forget.grad_norm != plain_forget.grad_norm
    assert list(retain.terms) == list(plain_retain.terms) == ["retain NLL"]
    settings = dataclasses.replace(settings, lr=1e-30)
    *_, unmoved = steps(small_lm(), with_rho(settings, 0.0))
    assert retain.grad_norm == unmoved.grad_norm


def test_a_resumed_run_is_the_run_to_the_bit(tmp_path):
    settings = dataclasses.replace(SETTINGS, epochs=3, batch_size=4)
    whole, one, state = dropout_lm(), dropout_lm(), TrainState()
    expected = [r.loss for r in steps(whole, settings)]
    losses = []
    for record in steps(one, settings, state=state):
        losses.append(record.loss)
        if record.step == 3:
            state.writer()(tmp_path)
            break
    other = dropout_lm()
    terms, first = build_method("NPO+RT"), dropout_lm()
    references = reference_log_probs(first, sources(), terms, 2048)
    other.model.load_state_dict(one.model.state_dict())
    rest = train(other, sources(), terms, settings, references, state=TrainState.load(tmp_path))
    assert losses + [r.loss for r in rest] == expected
    assert_same(weights(other), weights(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_of_memory_in_the_perturbed_pass_begins_the_same_step_again(dtype):
    """Where weights are moved when it strikes, they come back to the bit, in bf16 as well."""
    settings = dataclasses.replace(SETTINGS, sharpness_rho=50.0, micro_batch_tokens=200)
    lm, small = dropout_lm(dtype), dropout_lm(dtype)
    start, calls = weights(lm), []

    def check(module, args, kwargs):
        if torch.is_grad_enabled():
            calls.append([torch.equal(p, w) for p, w in zip(weights(lm), start, strict=True)])
            if len(calls) == 2:
                raise torch.OutOfMemoryError("9 bytes")

    lm.decoder.register_forward_pre_hook(check, with_kwargs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # adamw on bf16 weights
        (found,) = steps(lm, settings)
        tokens = found.micro_batch_tokens
        (expected,) = steps(small, dataclasses.replace(settings, micro_batch_tokens=tokens))
    assert all(calls[0]), "the first pass is that of w"
    assert not any(calls[1]), "memory ran out in the perturbed pass"
    assert tokens < 200
    assert all(calls[2]), "the step begins again at w"
    assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)
    assert_same(weights(lm), weights(small))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.filterwarnings("ignore:adamw rounds")
def test_whatever_ends_a_perturbed_pass_leaves_the_weights(error):
    lm = dropout_lm(torch.bfloat16)
    start, calls = weights(lm), []

    def fail(module, args, kwargs):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 2:
            raise error("now")

    lm.decoder.register_forward_pre_hook(fail, with_kwargs=True)
    run = steps(lm, dataclasses.replace(SETTINGS, sharpness_rho=50.0))
    with pytest.raises(error):
        next(run)
    assert_same(weights(lm), start)


def test_a_perturbed_loss_that_is_not_finite_leaves_the_weights():
    lm = small_lm()
    start = weights(lm)
    with pytest.raises(NonFiniteError, match="the weights stay those of step 0"):
        next(steps(lm, dataclasses.replace(SETTINGS, sharpness_rho=1e38)))
    assert_same(weights(lm), start)


def test_memory_for_one_sequence_says_that_the_copy_takes_some():
    lm = dropout_lm()
    limit_memory(lm, 5)
    with pytest.raises(OutOfMemory, match="leave out sharpness_rho, which copies the weights"):
        next(steps(lm, SETTINGS))


def test_a_forget_gradient_of_zero_moves_nothing():
    """SimNPO's weights vanish where an answer is improbable; the step keeps what is to be kept."""
    lm = small_lm()
    terms = build_method("SimNPO+RT", Coefficients(forget=0.0))
    (record,) = train(lm, sources(), terms, SETTINGS)
    other = small_lm()
    (expected,) = train(other, sources(), terms, with_rho(SETTINGS, 0.0))
    assert record.grad_norm == expected.grad_norm > 0
    assert_same(weights(lm), weights(other))


def test_adapters_alone_move():
    torch.manual_seed(0)
    lm = small_lm()
    lm = CausalLM(add_lora(lm.model, "base", 2), probe=False)
    base = [p.detach().clone() for p in lm.model.parameters() if not p.requires_grad]
    moved = []

    def look(module, args, kwargs):
        now = [p for p in lm.model.parameters() if not p.requires_grad]
        moved.append(all(torch.equal(p, q) for p, q in zip(now, base, strict=True)))

    lm.decoder.register_forward_pre_hook(look, with_kwargs=True)
    list(steps(lm, dataclasses.replace(SETTINGS, sharpness_rho=1.0)))
    assert moved
    assert all(moved)


def test_half_precision_that_swallows_the_perturbation_is_told():
    with pytest.warns(UserWarning, match="round away more than half of --sharpness-rho 1e-05"):
        list(steps(dropout_lm(torch.bfloat16), dataclasses.replace(SETTINGS, sharpness_rho=1e-5)))
    with warnings.catch_warnings(record=True) as heard:
        list(steps(dropout_lm(torch.bfloat16), dataclasses.replace(SETTINGS, sharpness_rho=5.0)))
    assert not any("sharpness" in str(w.message) for w in heard)


def test_fine_tuning_takes_sharpness_aware_steps_too():
    data = {"train": sources()["forget"]}
    (record,) = train(small_lm(), data, FINETUNE, SETTINGS)
    (plain,) = train(small_lm(), data, FINETUNE, with_rho(SETTINGS, 0.0))
    assert record.loss == plain.loss
    assert record.grad_norm != plain.grad_norm


def test_what_cannot_work_is_refused(capsys, tmp_path: Path):
    lm, terms = small_lm(), build_method("NPO+RT")
    with pytest.raises(UserError, match="sharpness_rho needs the gradient of all weights together"):
        check_settings(lm, sources(), terms, dataclasses.replace(SETTINGS, step_in_backward=True))
    with pytest.raises(UserError, match="no term forgets"):
        check_settings(lm, sources(), terms[1:], SETTINGS)
    for bad in ("-1", "nan", "inf", "much"):
        arguments = ["unlearn", "--model", "m", "--forget", "f", "--output", str(tmp_path / "run")]
        assert main([*arguments, "--sharpness-rho", bad]) == 2
        assert re.search("sharpness.rho", capsys.readouterr().err)
