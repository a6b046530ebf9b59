"""Small states, gradients that are never together, recomputed activations: the same training."""

import contextlib
import dataclasses
import math

import pytest
import torch
from torch.nn import Parameter, ParameterList

from npo_fast.cli import main
from npo_fast.errors import NonFiniteError, PartialUpdateError, UserError
from npo_fast.methods import build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs, train
from npo_fast.trainer.optimizers import build_optimizer, keep_states_on_cpu, step_one_at_a_time
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import (
    FACTS,
    calm_model,
    save_tiny_model,
    slow_but,
    sources,
    tiny_model,
    write_jsonl,
)

SETTINGS = TrainSettings(epochs=2, batch_size=4, lr=1e-3, micro_batch_tokens=400)
IN_BACKWARD = dataclasses.replace(SETTINGS, step_in_backward=True)
SMALL = ("adamw-8bit", "adamw-bf16")


def lm_of(dtype: torch.dtype = torch.float32, **overrides: object) -> CausalLM:
    torch.manual_seed(0)
    model = calm_model("Llama", hidden_size=64, **overrides)
    return CausalLM(model.to(dtype), probe=False)


def run(lm: CausalLM, settings: TrainSettings, method: str = "NPO+RT"):
    terms = build_method(method)
    references = reference_log_probs(lm, sources(), terms, settings.micro_batch_tokens)
    cache = reference_cache_for(terms, lm, sources(), settings.micro_batch_tokens)
    return list(train(lm, sources(), terms, settings, references, cache))


def weights(lm: CausalLM) -> list[torch.Tensor]:
    return [p.detach().clone() for p in lm.model.parameters()]


def furthest(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(one, other, strict=True))


@pytest.mark.parametrize("name", slow_but(["adamw"], ["adamw", *SMALL]))
def test_every_optimizer_lowers_the_loss(name):
    lm = lm_of(torch.bfloat16 if name == "adamw-bf16" else torch.float32)
    settings = dataclasses.replace(SETTINGS, epochs=6, lr=3e-3, optimizer=name)
    records = run(lm, settings)
    assert records[-1].loss < records[0].loss - 0.5
    assert records[1].lr > records[0].lr, "the schedule reaches torchao's learning rate"


def test_8bit_states_take_a_quarter_of_the_memory_and_steps_stay_close():
    torch.manual_seed(0)
    start = torch.randn(64, 256)
    found, bytes_ = {}, {}
    for name in ("adamw", "adamw-8bit"):
        parameter = Parameter(start.clone())
        optimizer = build_optimizer(ParameterList([parameter]), name, lr=1e-2, weight_decay=0.01)
        torch.manual_seed(1)
        for _ in range(5):
            parameter.grad = torch.randn_like(start)
            optimizer.step()
        found[name] = parameter.detach() - start
        states = optimizer.state[parameter]
        kept = [states["exp_avg"], states["exp_avg_sq"]]
        parts = [[t] if name == "adamw" else [t.codes, t.scale] for t in kept]
        bytes_[name] = sum(t.numel() * t.element_size() for part in parts for t in part)
    assert bytes_["adamw-8bit"] < 0.26 * bytes_["adamw"]
    gap = (found["adamw"] - found["adamw-8bit"]).norm() / found["adamw"].norm()
    assert gap < 0.1


@pytest.mark.parametrize("name", SMALL)
def test_bf16_weights_move_by_steps_that_rounding_to_nearest_loses(name):
    """Steps of 1e-4 on weights of 1, whose bf16 neighbours are 4e-3 and more away."""
    moved = {}
    for kind in ("adamw", name):
        parameter = Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
        hears = pytest.warns if kind == "adamw" else contextlib.nullcontext
        with hears(*[UserWarning] * (kind == "adamw")):
            optimizer = build_optimizer(ParameterList([parameter]), kind, lr=1e-4, weight_decay=0.0)
        for _ in range(10):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moved[kind] = float(1 - parameter.detach().float().mean())
    assert moved["adamw"] == 0.0, "and it warns of that"
    assert moved[name] == pytest.approx(10 * 1e-4, rel=0.1)


@pytest.mark.slow
def test_training_in_bf16_gains_by_rounding_at_random():
    lost, gained = lm_of(torch.bfloat16), lm_of(torch.bfloat16)
    before = weights(lost)
    settings = dataclasses.replace(SETTINGS, lr=1e-5, epochs=1, warmup_steps=0)
    run(lost, settings)
    run(gained, dataclasses.replace(settings, optimizer="adamw-bf16"))

    def share(lm: CausalLM) -> float:
        changed = sum(int((p != q).sum()) for p, q in zip(weights(lm), before, strict=True))
        return changed / sum(p.numel() for p in before)

    assert share(gained) > 1.5 * share(lost)


@pytest.mark.parametrize("method", slow_but(["IDK+RT"], ["NPO+RT", "DPO+KL", "KTO+RT", "IDK+RT"]))
def test_a_step_in_backward_is_the_ordinary_step_clipped_by_the_same_norm(method):
    """Several streams, pairs, KL, a baseline: all in one pass through the model."""
    settings = dataclasses.replace(SETTINGS, max_grad_norm=0.5)
    expected = run(lm_of(), settings, method)
    found = run(lm_of(), dataclasses.replace(settings, step_in_backward=True), method)
    assert expected[0].grad_norm > 0.5, "there is something to clip"
    for one, other in zip(expected, found, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4, abs=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
        assert other.log_probs == pytest.approx(one.log_probs, rel=1e-4)


@pytest.mark.parametrize("max_norm", [0.5, math.inf])
def test_the_same_pack_gives_the_same_weights_to_the_last_digits(max_norm):
    settings = dataclasses.replace(SETTINGS, batch_size=7, max_grad_norm=max_norm)
    ordinary, in_backward = lm_of(), lm_of()
    run(ordinary, settings, "NPO")
    run(in_backward, dataclasses.replace(settings, step_in_backward=True), "NPO")
    assert furthest(weights(ordinary), weights(in_backward)) < 1e-6


def test_a_tied_head_and_embedding_take_one_step_with_both_gradients():
    settings = dataclasses.replace(SETTINGS, batch_size=7)
    ordinary, in_backward = lm_of(tie_word_embeddings=True), lm_of(tie_word_embeddings=True)
    assert in_backward.head.weight is in_backward.model.get_input_embeddings().weight
    fired = []
    hook = in_backward.head.weight.register_post_accumulate_grad_hook(
        lambda p: fired.append(p.grad.clone())
    )
    before = weights(ordinary)
    run(ordinary, dataclasses.replace(settings, max_grad_norm=math.inf), "NPO")
    step = dataclasses.replace(settings, step_in_backward=True, max_grad_norm=math.inf)
    records = run(in_backward, step, "NPO")
    hook.remove()
    assert len(fired) == len(records)
    assert furthest(weights(ordinary), weights(in_backward)) < 1e-6
    assert furthest(before, weights(in_backward)) > 1e-4


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_gradients_never_exist_together(max_norm):
    lm = lm_of()
    alive = []
    parameters = list(lm.model.parameters())
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in parameters))
        )
    run(lm, dataclasses.replace(IN_BACKWARD, max_grad_norm=max_norm))
    assert set(alive) == {1}
    assert all(p.grad is None for p in parameters)
    sum(p.sum() for p in parameters).backward()
    assert all(p.grad is not None for p in parameters), "after training a backward leaves gradients"


def test_a_step_that_does_not_fit_a_micro_batch_is_refused_with_its_size():
    settings = dataclasses.replace(IN_BACKWARD, micro_batch_tokens=32)
    with pytest.raises(UserError, match=r"largest has (\d+) tokens .*micro_batch_tokens \1,"):
        run(lm_of(), settings)
    lm = lm_of()
    lm.packs = False
    with pytest.raises(UserError, match="one sequence at a time"):
        run(lm, IN_BACKWARD)


def poison_gradient_below(lm: CausalLM, layer: int) -> None:
    """NaN from this layer's output down, with a loss that is fine."""

    def poison(module, inputs, out):
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * math.nan)

    lm.decoder.layers[layer].register_forward_hook(poison)


@pytest.mark.parametrize("settings", [SETTINGS, IN_BACKWARD], ids=["ordinary", "in backward"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_touches_no_weight(settings, what):
    lm = lm_of()
    steps = train(lm, sources(), build_method("GA+RT"), settings)
    next(steps)
    good = weights(lm)
    if what == "gradient":
        poison_gradient_below(lm, 0)
    else:
        with torch.no_grad():  # of the norm before the head: not a weight that is compared
            lm.decoder.norm.register_forward_hook(lambda module, inputs, out: out * math.nan)
    with pytest.raises(NonFiniteError, match="the weights stay those of step 1") as caught:
        next(steps)
    assert not isinstance(caught.value, PartialUpdateError)
    assert furthest(good, weights(lm)) == 0.0


def test_without_a_norm_no_gradient_that_is_not_finite_is_applied_and_the_message_says_what_was():
    lm = lm_of()
    settings = dataclasses.replace(IN_BACKWARD, max_grad_norm=math.inf)
    steps = train(lm, sources(), build_method("GA+RT"), settings)
    next(steps)
    good = dict(zip((n for n, _ in lm.model.named_parameters()), weights(lm), strict=True))
    poison_gradient_below(lm, 0)
    with pytest.raises(PartialUpdateError, match=r"(\d+) tensors had taken their step") as caught:
        next(steps)
    now = dict(lm.model.named_parameters())
    assert all(p.isfinite().all() for p in now.values())
    moved = {name for name, p in now.items() if not torch.equal(p, good[name])}
    assert {name for name in moved if ".layers.0." in name or "embed" in name} == set()
    assert f"{len(moved)} tensors" in str(caught.value)


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_a_tensor_at_a_time_is_the_same_step(name):
    """As offloaded states take it; the moves themselves need a GPU."""
    torch.manual_seed(0)
    shapes, found = [(64, 256), (256,), (3, 5)], []
    starts = [torch.randn(s) for s in shapes]
    for offloaded in (False, True):
        parameters = [Parameter(start.clone()) for start in starts]
        optimizer = build_optimizer(ParameterList(parameters), name, lr=1e-2, weight_decay=0.1)
        if offloaded:
            keep_states_on_cpu(optimizer)
        torch.manual_seed(1)
        for _ in range(3):
            for p in parameters[: 2 if _ == 1 else 3]:
                p.grad = torch.randn_like(p)
            step_one_at_a_time(optimizer) if offloaded else optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach() for p in parameters])
    assert furthest(*found) == 0.0


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_states_that_are_read_stay_in_cpu_memory(name):
    """The meta device stands in for a GPU: a state that went there would have no values."""
    own = Parameter(torch.ones(64, 256))
    saved = build_optimizer(ParameterList([own]), name, lr=1e-2, weight_decay=0.1)
    own.grad = torch.ones_like(own)
    saved.step()
    elsewhere = Parameter(torch.ones(64, 256, device="meta"))
    optimizer = torch.optim.AdamW([elsewhere], lr=1e-2, fused=False)
    fused = saved.param_groups[0].get("fused")
    optimizer.param_groups[0]["fused"] = fused
    keep_states_on_cpu(optimizer)
    content = saved.state_dict()
    optimizer.load_state_dict(content)
    states = optimizer.state[elsewhere]
    assert states["step"].device.type == ("meta" if fused else "cpu")
    for state in ("exp_avg", "exp_avg_sq"):
        assert states[state].device.type == "cpu"
        assert states[state] is content["state"][0][state]
    assert content["state"], "what was read stays as it was"


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_tokens", [30, 400])
def test_recomputed_activations_give_the_same_gradients(micro_batch_tokens):
    settings = dataclasses.replace(SETTINGS, micro_batch_tokens=micro_batch_tokens)
    kept, recomputed = lm_of(), lm_of()
    passes = [0]

    def count(module, inputs):
        passes[0] += 1

    recomputed.decoder.layers[0].mlp.register_forward_pre_hook(count)
    expected = run(kept, settings)
    found = run(recomputed, dataclasses.replace(settings, gradient_checkpointing=True))
    assert [r.grad_norm for r in expected] == [r.grad_norm for r in found]
    assert furthest(weights(kept), weights(recomputed)) == 0.0
    without = [0]
    again = lm_of()
    again.decoder.layers[0].mlp.register_forward_pre_hook(
        lambda module, inputs: without.__setitem__(0, without[0] + 1)
    )
    run(again, settings)
    assert passes[0] > 1.4 * without[0], "the backward ran the layer again"


@pytest.mark.slow
@pytest.mark.parametrize("max_norm", [0.5, math.inf])
def test_recomputed_activations_and_a_step_in_backward_go_together(max_norm):
    settings = dataclasses.replace(SETTINGS, batch_size=7, max_grad_norm=max_norm)
    plain, lean = lm_of(), lm_of()
    run(plain, settings, "NPO")
    run(
        lean,
        dataclasses.replace(settings, step_in_backward=True, gradient_checkpointing=True),
        "NPO",
    )
    assert furthest(weights(plain), weights(lean)) < 1e-5


def test_what_cannot_work_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"adamw-bf16 rounds bf16 weights.*float32: add dtype"):
        run(lm_of(), dataclasses.replace(SETTINGS, optimizer="adamw-bf16"))
    with pytest.raises(UserError, match="on a CPU they lie there anyway"):
        run(lm_of(), dataclasses.replace(SETTINGS, offload_optimizer=True))
    with pytest.raises(UserError, match="max_grad_norm must be positive or inf, got nan"):
        TrainSettings(max_grad_norm=math.nan)
    half = CausalLM(tiny_model("Llama").half(), probe=False)
    with pytest.raises(UserError, match="fp16 weights cannot be trained"):
        run(half, SETTINGS)
    with pytest.raises(UserError, match="warmup_steps must be 0 or more, got -5"):
        TrainSettings(warmup_steps=-5)
    with pytest.raises(UserError, match="weight_decay must be 0 or more, got nan"):
        TrainSettings(weight_decay=math.nan)
    frozen = lm_of()
    frozen.model.requires_grad_(False)
    with pytest.raises(UserError, match="no weight of this model can be trained"):
        run(frozen, SETTINGS)
    monkeypatch.setattr("npo_fast.trainer.optimizers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torchao"):
        run(lm_of(), dataclasses.replace(SETTINGS, optimizer="adamw-8bit"))


@pytest.mark.slow
def test_the_command_line_takes_every_optimizer_and_checks_before_loading(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "base")
    data = write_jsonl(tmp_path / "facts.jsonl", FACTS)
    command = ["unlearn", "--model", str(model), "--forget", f"{data}[:4]", "--retain",
               f"{data}[4:]", "--batch-size", "4", "--epochs", "2", "--no-report"]  # fmt: skip
    lean = ["--optimizer", "adamw-bf16", "--dtype", "bf16", "--gradient-checkpointing",
            "--step-in-backward"]  # fmt: skip
    assert main([*command, *lean, "--output", str(tmp_path / "lean")]) == 0
    assert main([*command, *lean, "--max-grad-norm", "inf", "--optimizer", "adamw-8bit",
                 "--output", str(tmp_path / "unclipped")]) == 0  # fmt: skip
    capsys.readouterr()
    assert main([*command, *lean, "--micro-batch-tokens", "16", "--dry-run"]) == 2
    assert "--step-in-backward takes a whole step at once" in capsys.readouterr().err
