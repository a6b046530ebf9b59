"""``head_of``: what a loss in another's loop needs of a model, and nothing about it changes."""

import warnings

import pytest
import torch

import npo_fast
from npo_fast import (
    FusedLinearKLLoss,
    FusedLinearKTOLoss,
    FusedLinearNPOLoss,
    head_of,
    linear_kl,
    npo_loss,
    sequence_log_probs,
)
from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM
from tests.helpers import VOCABULARY, slow_but, tiny_model

FAMILIES = ["Llama", "Gemma2", "Cohere", "Granite", "Phi", "GPT2"]


@pytest.mark.parametrize("family", slow_but(["Gemma2", "Phi"], FAMILIES))
def test_log_probs_with_the_head_are_those_of_the_models_own_logits(family):
    model = tiny_model(family).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = head_of(model)
    ids = torch.randint(3, VOCABULARY, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.clone()
    labels[0, :4] = -100
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    found = sequence_log_probs(hidden, labels=labels, attention_mask=mask, **head)
    logits = model(input_ids=ids, attention_mask=mask).logits
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    expected = (log_probs * mask[:, 1:] * (labels[:, 1:] != -100)).sum(1)
    torch.testing.assert_close(found, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(found, parameters, upstream, retain_graph=True),
        torch.autograd.grad(expected, parameters, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_its_keys_are_keywords_of_every_loss():
    model = tiny_model("Gemma2")
    head = head_of(model)
    hidden, labels = torch.randn(5, 32), torch.randint(0, VOCABULARY, (5,))
    cu_seqlens, ref = torch.tensor([0, 2, 5]), torch.zeros(2)
    assert npo_loss(hidden, labels=labels, cu_seqlens=cu_seqlens, ref_log_probs=ref, **head) > 0
    ref_head = {f"ref_{name}": value for name, value in head.items()}
    assert float(linear_kl(hidden, ref_hidden=hidden, **head, **ref_head).detach()) < 1e-6


def test_modules_take_them_in_place_of_their_own_settings():
    head = head_of(tiny_model("Gemma2"))
    weight = head.pop("weight")
    hidden, target = torch.randn(2, 5, 32), torch.randint(0, VOCABULARY, (2, 5))
    options = {key: head[key] for key in ("softcap", "logit_scale")}
    for make, more in (
        (FusedLinearNPOLoss, {"ref_log_probs": torch.zeros(2)}),
        (FusedLinearKTOLoss, {"ref_log_probs": torch.zeros(2), "z": 0.3}),
        (FusedLinearKLLoss, {"ref_hidden": hidden + 1, "ref_weight": weight}),
    ):
        at_call = make()(weight, hidden, target, **more, **head)
        assert torch.equal(at_call, make(**options)(weight, hidden, target, **more))
        assert not torch.allclose(at_call, make()(weight, hidden, target, **more))
        with pytest.raises(TypeError, match="has no option 'soft_cap'; of the head it has softcap"):
            make()(weight, hidden, target, **more, soft_cap=3.0)


def test_the_weight_is_the_models_own_and_the_model_stays_as_it_was():
    model = tiny_model("Llama").train()
    before, state = model.config._attn_implementation, torch.get_rng_state()
    head = npo_fast.head_of(model)
    assert head["weight"] is model.lm_head.weight
    assert model.training
    assert model.config._attn_implementation == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert head_of(CausalLM(model))["weight"] is model.lm_head.weight


def test_wrappers_are_looked_through():
    model = tiny_model("Llama")
    assert head_of(torch.nn.DataParallel(model))["weight"] is model.lm_head.weight


@pytest.mark.slow
def test_an_adapter_and_a_compiled_model_are_looked_through():
    peft = pytest.importorskip("peft")
    model = tiny_model("Llama")
    assert head_of(torch.compile(model))["weight"] is model.lm_head.weight
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert head_of(adapted)["weight"] is model.lm_head.weight


def test_what_has_no_head_to_read_is_told_in_a_line():
    with pytest.raises(UserError, match=r"got Linear \(of a layer pass weight=layer.weight\)"):
        head_of(tiny_model("Llama").lm_head)
    with pytest.raises(UserError, match="head_of reads a causal language model .* got str"):
        head_of("my-model")
    sharded = tiny_model("Llama")
    sharded.lm_head.weight = torch.nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    with pytest.raises(UserError, match="LM head of LlamaForCausalLM is sharded"):
        head_of(sharded)
