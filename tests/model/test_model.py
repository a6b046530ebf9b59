"""A packed batch is the same computation as its sequences alone, for every family of model."""

import pytest
import torch

from npo_fast.data import TokenizedExample, pack
from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.generation import generate
from tests.helpers import VOCABULARY, slow_but, tiny_model

PACKED = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "GPTNeoX", "Phi", "Cohere", "Granite"]


def sequences() -> list[TokenizedExample]:
    lengths = [(9, 3), (2, 1), (17, 5), (9, 8), (11, 1)]
    return [
        TokenizedExample(tuple(torch.randint(3, VOCABULARY, (n,)).tolist()), prompt, i)
        for i, (n, prompt) in enumerate(lengths)
    ]


def plain_log_probs(model, sequence: TokenizedExample) -> torch.Tensor:
    ids = torch.tensor([sequence.input_ids])
    log_probs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    first = sequence.prompt_length
    return log_probs[first - 1 : -1].gather(1, ids[0, first:, None]).squeeze(1)


@pytest.mark.parametrize(
    "family", slow_but(["Llama", "Gemma2", "GPT2", "Bloom"], [*PACKED, "GPT2", "Bloom"])
)
@pytest.mark.filterwarnings("ignore:.*one at a time")
def test_a_pack_gives_the_log_probs_of_its_sequences_alone(family: str) -> None:
    model = tiny_model(family)
    items = sequences()
    expected = {s.index: plain_log_probs(model, s).detach() for s in items}
    lm = CausalLM(model)
    assert lm.packs == (family not in ("Bloom",)), "every family but Bloom keeps a pack apart"
    (batch,) = pack(items, max_tokens=1000)
    found = lm.log_probs(batch)
    bounds = batch.answer_cu_seqlens.tolist()
    for i, index in enumerate(batch.indices):
        torch.testing.assert_close(
            found[bounds[i] : bounds[i + 1]], expected[index], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_gradients_of_a_pack_are_those_of_its_sequences(family: str) -> None:
    model = tiny_model(family)
    items = sequences()
    torch.stack([plain_log_probs(model, s).sum() for s in items]).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    lm = CausalLM(model)
    (batch,) = pack(items, max_tokens=1000)
    lm.log_probs(batch).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_probe_refuses_a_head_it_does_not_know() -> None:
    model = tiny_model("Llama")
    head = model.lm_head
    model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5 + head.weight[:, 0])
    with pytest.raises(UserError, match="LM head"):
        CausalLM(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_a_pack_runs_one_sequence_at_a_time(dtype) -> None:
    model = tiny_model("FalconH1").to(dtype)
    with pytest.warns(UserWarning, match="one at a time"):
        lm = CausalLM(model)
    assert not lm.packs


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("Llama", "auto"),
        ("Gemma2", "auto"),
        pytest.param("Llama", "sdpa", marks=pytest.mark.slow),
        pytest.param("Qwen3", "eager", marks=pytest.mark.slow),
    ],
)
def test_rounding_is_not_taken_for_mixing(family: str, attention: str) -> None:
    model = tiny_model(family, num_hidden_layers=16).to(torch.bfloat16)
    assert CausalLM(model, attention).packs


def test_a_window_in_a_config_whose_model_has_none_is_no_hindrance() -> None:
    lm = CausalLM(tiny_model("Llama", sliding_window=16))
    lm.log_probs(*pack([TokenizedExample(tuple(range(3, 40)), 1, 0)], 100))


def test_an_attention_that_knows_less_gives_way_to_the_models_own() -> None:
    model = tiny_model("GptOss")
    items = sequences()
    with pytest.warns(UserWarning, match="it keeps eager"):
        lm = CausalLM(model)
    (batch,) = pack(items, max_tokens=1000)
    expected = torch.cat([plain_log_probs(model, items[i]) for i in batch.indices])
    torch.testing.assert_close(lm.log_probs(batch), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="s_aux is not supported"):
        CausalLM(tiny_model("GptOss"), attention="npo_fast_packed")


def test_a_window_that_only_the_mask_knows_is_not_overlooked() -> None:
    lm = CausalLM(tiny_model("Qwen2Moe"))
    within = TokenizedExample(tuple(range(3, 19)), 1, 0)
    beyond = TokenizedExample(tuple(range(3, 20)), 1, 0)
    lm.log_probs(*pack([within], 100))
    with pytest.raises(UserError, match="looks back 16 tokens .* a sequence has 17"):
        lm.log_probs(*pack([beyond], 100))


@pytest.mark.parametrize(
    ("attention", "why"),
    [("sdpa", "does not support an attention implementation"), ("flash", "flash")],
)
def test_an_attention_that_the_model_cannot_take_is_refused(attention: str, why: str) -> None:
    with pytest.raises(UserError, match=f"Gemma2ForCausalLM cannot take attention .*{why}"):
        CausalLM(tiny_model("Gemma2"), attention)


def test_the_decoder_is_found_where_the_model_names_itself() -> None:
    model = tiny_model("Llama4Text")
    lm = CausalLM(model)
    assert lm.decoder is model.model


def test_generation_continues_greedily_and_leaves_training_mode_alone() -> None:
    model = tiny_model("Llama")
    lm = CausalLM(model)
    model.train()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    found = generate(lm, prompts, max_new_tokens=4, pad_id=0, stop_ids=2)
    assert model.training
    for prompt, continuation in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in continuation:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert token == int(logits.argmax())
            ids.append(token)
