"""RMU: hidden states of one decoder layer, steered on forget data and held on retain data."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import npo_fast
from npo_fast import Callback, ModelOptions, ReportOptions
from npo_fast.cli import main
from npo_fast.data import pack
from npo_fast.errors import UserError
from npo_fast.losses import NLL, RMU
from npo_fast.methods import Coefficients, Term, build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.layers import layer_number
from npo_fast.trainer.loop import check_settings, reference_cache_for, train
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.step import accumulate_gradients
from npo_fast.trainer.update import Update
from tests.helpers import (
    FACTS,
    calm_model,
    metadata_of,
    read_jsonl,
    save_tiny_model,
    slow_but,
    sources,
    write_jsonl,
)

DEPTH = 4


def deep_lm(family="Llama", dtype=torch.float32, **more):
    torch.manual_seed(0)
    size = {"n_layer": DEPTH} if family in ("GPT2", "Bloom") else {"num_hidden_layers": DEPTH}
    return CausalLM(calm_model(family, **size, **more).to(dtype), probe=False)


def data():
    found = sources()
    return {"forget": found["forget"], "retain": found["retain"][:7]}


def moved(model):
    """A copy of the weights, changed: the distance of retain states is not 0."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.mul_(1.02 + 0.01 * (i % 3))


def by_hand(model, start, layer, steering, alpha, everywhere=False, seed=0):
    """RMU's loss by Hugging Face's ``output_hidden_states``, one sequence at a time.

    A mean over sequences of the mean over tokens, where open-unlearning takes the tokens whose
    label is not -100: those of the answer.
    """
    u = torch.rand(32, generator=torch.Generator().manual_seed(seed))
    target = steering * u / u.norm()

    def states(of, example):
        ids = torch.tensor([example.input_ids])
        hidden = of(ids, output_hidden_states=True).hidden_states
        first = 0 if everywhere else example.prompt_length
        return hidden[layer + 1][0, first:]

    found = data()
    forget = [(states(model, s) - target).square().mean(-1).mean() for s in found["forget"]]
    with torch.no_grad():
        before = [states(start, s) for s in found["retain"]]
    now = [states(model, s) for s in found["retain"]]
    retain = [(x - y).square().mean(-1).mean() for x, y in zip(now, before, strict=True)]
    return torch.stack(forget).mean(), torch.stack(retain).mean(), alpha


def gradients(lm, terms, cache, tokens):
    optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.0)
    update = Update(optimizer, torch.inf)
    values, log_probs = accumulate_gradients(lm, data(), terms, tokens, update, None, cache)
    return values, {name: p.grad for name, p in lm.model.named_parameters()}, log_probs


@pytest.mark.parametrize("tokens", [1, 30, 2048])
@pytest.mark.parametrize("family", slow_but(["Llama"], ["Llama", "Gemma2", "GPT2", "GPTNeoX"]))
@pytest.mark.parametrize("positions", ["answer", "all"])
def test_values_and_gradients_are_those_of_plain_pytorch(family, positions, tokens):
    lm = deep_lm(family, torch.float64)
    terms = build_method("RMU", Coefficients(steering=3.0, retain=5.0, layer=1), positions)
    cache = reference_cache_for(terms, lm, data(), 2048)
    moved(lm.model)
    values, ours, log_probs = gradients(lm, terms, cache, tokens)
    assert log_probs == {}
    plain, start = deep_lm(family, torch.float64).model, deep_lm(family, torch.float64).model
    moved(plain)
    forget, retain, alpha = by_hand(plain, start, 1, 3.0, 5.0, positions == "all")
    (forget + alpha * retain).backward()
    assert values == pytest.approx({"RMU": forget.item(), "held states": retain.item()}, rel=1e-6)
    for name, parameter in plain.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            assert ours[name] is None or not ours[name].any(), name
        else:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packs", [True, False])
def test_later_layers_never_run_and_their_weights_stay_to_the_bit(packs, checkpointing):
    lm = deep_lm()
    lm.packs = packs
    runs = [0] * DEPTH
    for i, layer in enumerate(lm.model.model.layers):
        plain = layer.forward

        def counted(*args, i=i, plain=plain, **kwargs):
            runs[i] += 1
            return plain(*args, **kwargs)

        layer.forward = counted
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    terms = build_method("RMU", Coefficients(layer=1))
    settings = TrainSettings(
        epochs=2, batch_size=7, lr=1e-2, weight_decay=0.5, warmup_steps=0,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    cache = reference_cache_for(terms, lm, data(), 2048)
    assert cache.made_from["layer"] == 1
    *_, last = train(lm, data(), terms, settings, None, cache)
    assert last.log_probs == {}
    assert min(runs[:2]) > 0
    assert runs[2:] == [0, 0]
    changed = {n for n, p in lm.model.named_parameters() if not torch.equal(p, before[n])}
    reached = {n for n in before if "layers.0." in n or "layers.1." in n or "embed_tokens" in n}
    assert changed == reached
    assert [type(layer).__name__ for layer in lm.model.model.layers] == ["LlamaDecoderLayer"] * 4
    lm.model(torch.tensor([[1, 2, 3]]))
    assert runs[3] == 1  # and it is whole again


def test_forget_answers_become_improbable_and_retain_states_stay_nearer_with_their_term():
    def run(retain):
        lm, terms = deep_lm(), build_method("RMU", Coefficients(retain=retain, layer=1))
        cache = reference_cache_for(terms, lm, data(), 2048)
        (batch,) = pack(data()["forget"], 2048)
        before = lm.log_probs(batch).sum().item()
        settings = TrainSettings(epochs=20, batch_size=7, lr=1e-2)
        *_, last = train(lm, data(), terms, settings, None, cache)
        return before - lm.log_probs(batch).sum().item(), last.terms["held states"]

    (lost, moved_kept), (_, moved_free) = run(100.0), run(0.0)
    assert lost > 1
    assert moved_kept < 0.5 * moved_free


def test_stepping_in_the_backward_is_the_same_run():
    def run(**more):
        lm, terms = deep_lm(), build_method("RMU", Coefficients(layer=1))
        cache = reference_cache_for(terms, lm, data(), 2048)
        list(train(lm, data(), terms, TrainSettings(epochs=3, batch_size=7, lr=1e-2, **more),
                   None, cache))  # fmt: skip
        return lm.model.state_dict()

    expected = run()
    for name, value in run(step_in_backward=True).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_the_direction_is_drawn_by_the_seed_of_the_run():
    first, other = RMU(seed=1).target(32), RMU(seed=2).target(32)
    assert torch.equal(first, RMU(seed=1).target(32))
    assert not torch.allclose(first, other)
    assert float(first.norm()) == pytest.approx(20.0)
    assert float(first.min()) >= 0

    def loss(seed):
        lm, terms = deep_lm(), build_method("RMU", Coefficients(retain=0.0))
        cache = reference_cache_for(terms, lm, data(), 2048)
        settings = TrainSettings(epochs=1, batch_size=7, seed=seed)
        return next(train(lm, data(), terms, settings, None, cache)).terms["RMU"]

    assert loss(0) == loss(0) != loss(3)


def test_the_layer_is_the_last_of_the_first_quarter_unless_it_is_named():
    def number(depth, layer=None):
        lists = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(depth)])
        return layer_number(torch.nn.ModuleDict({"layers": lists}), layer)

    assert [number(n) for n in (2, 4, 16, 30, 32)] == [0, 0, 3, 6, 7]
    with pytest.raises(UserError, match="no decoder layer 4 .its last is 3.: name another layer"):
        number(4, 4)
    with pytest.raises(UserError, match="layer must be 0 or more, got -1"):
        build_method("RMU", Coefficients(layer=-1))
    with pytest.raises(UserError, match="steering must be finite, got nan"):
        build_method("RMU", Coefficients(steering=float("nan")))


def test_what_cannot_be_done_is_refused_by_name():
    terms = build_method("RMU")
    mixed = (*terms[:1], Term("retain NLL", "forget", NLL(), "token_mean"))
    with pytest.raises(UserError, match="must all be of one decoder layer, or none of any"):
        check_settings(deep_lm(), data(), mixed, TrainSettings())


def test_the_preset_has_open_unlearnings_coefficients():
    steer, hold = build_method("RMU", preset="open-unlearning")
    assert (steer.loss, steer.coefficient) == (RMU(7, 2.0), 1.0)
    assert (hold.loss.layer, hold.coefficient) == (7, 1.0)


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
         "--batch-size", "2", "--lr", "1e-3", "--no-report", "--method", "RMU", *more]
    )  # fmt: skip


def test_a_run_records_its_layer_keeps_a_cache_and_is_read_by_evaluate_and_report(
    home, tmp_path, capsys
):
    cache = ("--reference-cache", str(tmp_path / "reference"))
    assert unlearn(home, tmp_path / "one", "--layer", "1", *cache) == 0
    assert "layer 1 of 2 (0 to 1): no later layer runs or trains" in capsys.readouterr().err
    assert json.loads((tmp_path / "one/run.json").read_text())["reference"]["layer"] == 1
    index = tmp_path / "reference/states-layer-1/reference.json"
    written = index.stat().st_mtime_ns
    assert not (index.parent / "head.safetensors").exists()
    assert unlearn(home, tmp_path / "two", "--layer", "1", *cache) == 0
    assert index.stat().st_mtime_ns == written
    losses = [[s["loss"] for s in read_jsonl(tmp_path / n / "steps.jsonl")] for n in ("one", "two")]
    assert losses[0] == losses[1]
    assert unlearn(home, tmp_path / "three", *cache) == 0  # beside it, of another layer
    assert (tmp_path / "reference/states-layer-0").is_dir()
    assert unlearn(home, tmp_path / "four", "--layer", "2") == 2
    assert "no decoder layer 2 (its last is 1): name another --layer" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "one"), "--output", str(tmp_path / "page.html")]) == 0
    assert "RMU" in (tmp_path / "page.html").read_text()


def test_a_reference_of_another_form_is_refused(home, tmp_path, capsys):
    config = AutoConfig.from_pretrained(home / "model")
    config.hidden_size *= 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    assert unlearn(home, tmp_path / "run", "--reference", str(tmp_path / "wide")) == 2
    assert "name a model of the same form" in capsys.readouterr().err


class _Stumble(Callback):
    def on_step(self, record):
        if record.step == 3:
            raise ValueError("here")


@pytest.mark.parametrize("lora_rank", slow_but([0], [0, 2]))
def test_a_run_that_broke_off_goes_on_to_the_bit(home, tmp_path, lora_rank):
    def run(output, *callbacks):
        return npo_fast.unlearn(
            str(home / "model"), forget=str(home / "forget.jsonl"), method="RMU",
            retain=str(home / "retain.jsonl"), output=tmp_path / output, callbacks=callbacks,
            loading=ModelOptions(lora_rank=lora_rank), report=ReportOptions(no_report=True),
            training=TrainSettings(epochs=3, batch_size=2, lr=1e-2),
        )  # fmt: skip

    run("whole")
    with pytest.raises(ValueError, match="here"):
        run("broken", _Stumble())
    run("broken")
    assert metadata_of(tmp_path / "broken")["resumed"]
    name = "adapter_model.safetensors" if lora_rank else "model.safetensors"
    whole, resumed = (load_file(tmp_path / n / "model" / name) for n in ("whole", "broken"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
