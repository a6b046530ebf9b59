"""Attention within packs, what gives way to the model's own, and generation."""

import pytest
import torch

from npo_fast.data import TokenizedExample, pack
from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.generation import generate
from npo_fast.model.load import load_generation_config
from tests.helpers import GEMMA2, VOCABULARY, save_tiny_model, tiny_model


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
    [
        pytest.param("sdpa", "does not support an attention implementation", marks=GEMMA2.marks),
        ("flash", "flash"),
    ],
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


@pytest.mark.parametrize("family", ["Llama", "Mistral", GEMMA2, "GPT2"])
def test_generate_and_padded_batches_work_beside_training(family: str) -> None:
    model = tiny_model(family)
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 10, 11, 12, 13]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected, logits = model.generate(**inputs, **settings), model(**inputs).logits
    assert CausalLM(model).attention == "npo_fast_packed"
    assert torch.equal(model.generate(**inputs, **settings), expected)
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[shown], logits[shown], rtol=1e-4, atol=1e-4)


def test_a_model_in_a_wrapper_is_refused_with_what_to_pass() -> None:
    with pytest.raises(UserError, match="got DataParallel: pass its .module"):
        CausalLM(torch.nn.DataParallel(tiny_model("Llama")))


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"eos_token_id": 1'])
def test_a_damaged_generation_config_is_no_missing_one(tmp_path, content) -> None:
    folder = save_tiny_model(tmp_path / "model")
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert load_generation_config(str(folder)) is None
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json.*mend or delete it"):
        load_generation_config(str(folder))
