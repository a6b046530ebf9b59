"""Each family of models is taken as what it is: in packs, one sequence at a time, or not at all."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM
from tests.helpers import slow_but

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "families.py"
spec = importlib.util.spec_from_file_location("families", SCRIPT)
families = importlib.util.module_from_spec(spec)
sys.modules["families"] = families  # dataclasses look there
spec.loader.exec_module(families)

EXPECTED = {
    "llama": "packed", "gemma2": "packed", "gpt2": "packed", "doge": "packed",
    "granite": "packed", "bloom": "one by one", "blenderbot-small": "one by one",
    "jamba": "one by one", "falcon_h1": "one by one", "modernbert-decoder": "refused",
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    slow_but([("llama", "packed"), ("jamba", "one by one"), ("doge", "packed")], EXPECTED.items()),
)
def test_a_family_is_taken_as_what_it_is(case: tuple[str, str]) -> None:
    family, verdict = case
    result = families.judge(family)
    assert (result.verdict, result.wrong) == (verdict, False), families.line(result)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(families.FAMILIES) - set(EXPECTED)))
def test_no_family_is_taken_for_what_it_is_not(family: str) -> None:
    result = families.judge(family)
    assert not result.wrong, families.line(result)


def test_the_page_of_families_shows_the_result_file() -> None:
    document = json.loads(families.RESULT.read_text())
    results = [families.Verdict(**row) for row in document["families"]]
    assert families.PAGE.read_text() == families.page(results, document["versions"])
    assert not any(result.wrong for result in results)


class Changed(LlamaForCausalLM):
    """Llama with something else after its head, under a name that no configuration knows."""

    def __init__(self, change, dtype=torch.float32, **settings) -> None:
        torch.manual_seed(0)
        super().__init__(LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, **settings,
        ))  # fmt: skip
        self.change = change
        self.to(dtype).eval()

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out


def cap(logits, softcap: float):
    return (logits.float() / softcap).tanh() * softcap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "scale", "softcap"),
    [
        (lambda z: z * 0.02, 0.02, None),
        (lambda z: z / 6, 1 / 6, None),
        (lambda z: z * 0.98, 0.98, None),
        (lambda z: z * 48**-0.5, 48**-0.5, None),
        (lambda z: -z, -1.0, None),
        (lambda z: cap(z, 30.0), 1.0, 30.0),
        (lambda z: cap(z, 5000.0), 1.0, 5000.0),
        (lambda z: cap(z, 30.0) * 0.25, 0.25, 30.0),
        (lambda z: cap(z * 0.25, 30.0), 0.25, 120.0),
    ],
)
def test_scale_and_softcap_are_measured_under_any_name(change, scale, softcap, dtype) -> None:
    model = Changed(change, dtype)
    transform = CausalLM(model, probe=False).transform
    assert transform.logit_scale == pytest.approx(scale, rel=1e-6)
    assert transform.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-5))


def test_logits_that_are_nearly_equal_are_no_hindrance() -> None:
    assert CausalLM(Changed(lambda z: z * 1e-4)).packs


def test_a_hook_on_the_head_is_measured() -> None:
    model = Changed(lambda z: z)
    model.lm_head.register_forward_hook(lambda _module, _inputs, out: out * 0.5)
    assert CausalLM(model).transform.logit_scale == 0.5


def wide(model):
    """A head that takes other hidden states than the decoder makes."""
    model.mix = torch.nn.Linear(32, 32, bias=False)
    model.lm_head.register_forward_pre_hook(lambda _module, inputs: (model.mix(inputs[0]),))


def own_scale(model):
    model.scale = torch.nn.Parameter(torch.ones(()))
    model.change = lambda z: z * model.scale


REFUSED = {
    "clamp": lambda m: setattr(m, "change", lambda z: z.clamp(-50, 50)),
    "other nonlinearity": lambda m: setattr(m, "change", lambda z: z + 1e-3 * z.square()),
    "scale of the vocabulary": lambda m: setattr(
        m, "change", lambda z: z * torch.linspace(0.9, 1, z.shape[-1])
    ),
    "mask": lambda m: setattr(m, "change", lambda z: z.index_fill(-1, torch.tensor(96), -1e9)),
    "fewer tokens": lambda m: setattr(m, "change", lambda z: z[..., :-1]),
    "norm": lambda m: m.lm_head.register_forward_pre_hook(
        lambda _module, inputs: (torch.nn.functional.layer_norm(inputs[0], (32,)),)
    ),
    "projection": wide,
    "trained scale": own_scale,
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_scale_and_softcap_is_refused_in_one_line(kind: str, dtype) -> None:
    model = Changed(lambda z: z)
    REFUSED[kind](model)
    with pytest.raises(UserError, match="its logits are no scale and softcap") as error:
        CausalLM(model.to(dtype))
    assert "\n" not in str(error.value)


def test_a_scaled_input_of_a_head_with_a_bias_is_refused() -> None:
    model = Changed(lambda z: z)
    model.lm_head.register_forward_pre_hook(lambda _module, inputs: (inputs[0] / 3,))
    assert CausalLM(model).transform.logit_scale == pytest.approx(1 / 3)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(97))
    with pytest.raises(UserError, match="no scale and softcap"):
        CausalLM(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_layer_that_looks_at_the_token_before_runs_one_by_one(size: float, dtype) -> None:
    model = Changed(lambda z: z)

    def look_back(_module, _inputs, out):
        return out + size * torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :-1]

    model.model.layers[0].mlp.register_forward_hook(look_back)
    with pytest.warns(UserWarning, match="mixes the sequences of a pack"):
        assert not CausalLM(model.to(dtype)).packs


def test_weights_are_untouched_by_the_probe() -> None:
    model = Changed(lambda z: z, torch.bfloat16, tie_word_embeddings=True)
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    lm = CausalLM(model.train())
    assert model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, p in model.named_parameters():
        same, pointer, values = before[name]
        assert p is same, name
        assert p.data_ptr() == pointer, name
        assert torch.equal(p, values), name
        assert p.grad is None, name
    assert lm.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_compiled_model_keeps_nothing_of_the_probe() -> None:
    model, ids = Changed(lambda z: z).requires_grad_(False), torch.arange(3, 12)[None]
    expected = model(input_ids=ids).logits
    compiled = torch.compile(model, backend="eager")
    CausalLM(compiled)
    assert torch.equal(compiled(input_ids=ids).logits, expected)
