"""Adapters: nothing until the first step, the only thing that trains, and back from the disk."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from npo_fast.cli import main
from npo_fast.data import pack
from npo_fast.errors import UserError
from npo_fast.methods import build_method
from npo_fast.model.adapters import merge_adapter, read_weights, write_weights
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.load import load_model
from npo_fast.trainer.loop import reference_log_probs, train
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import (
    FACTS,
    calm_model,
    save_tiny_model,
    sequences,
    slow_but,
    tiny_model,
    write_jsonl,
)

SETTINGS = TrainSettings(epochs=4, batch_size=7, lr=1e-2, warmup_steps=0)
DATA = {"forget": sequences(7, 1), "retain": sequences(11, 2)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model on disk; 64 wide, as 4-bit blocks are."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    calm_model("Llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def log_probs(lm: CausalLM) -> torch.Tensor:
    (batch,) = pack(DATA["forget"], 2048)
    with torch.no_grad():
        return lm.log_probs(batch)


def run(lm: CausalLM, settings: TrainSettings = SETTINGS, method: str = "NPO+RT"):
    terms = build_method(method)
    references = reference_log_probs(lm, DATA, terms, settings.micro_batch_tokens)
    return list(train(lm, DATA, terms, settings, references))


@pytest.mark.parametrize("quantize", slow_but(["none"], ["none", "4bit"]))
def test_an_adapter_is_the_reference_until_the_first_step_and_trains_alone(base, quantize):
    plain = load_model(str(base), device="cpu", quantize=quantize)
    lm = load_model(str(base), device="cpu", quantize=quantize, lora_rank=4)
    assert torch.equal(log_probs(lm), log_probs(plain)), "B is 0"
    trained = {name for name, p in lm.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    frozen = {n: p.clone() for n, p in lm.model.named_parameters() if n not in trained}
    records = run(lm)
    assert records[-1].log_probs["forget"] < records[0].log_probs["forget"] - 0.5
    for name, parameter in lm.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    with lm.model.disable_adapter():
        assert torch.equal(log_probs(lm), log_probs(plain)), "adapters off give the reference"


@pytest.mark.parametrize("quantize", slow_but(["4bit"], ["none", "4bit"]))
def test_recomputed_activations_really_train_an_adapter(base, quantize):
    found = []
    for recompute in (False, True):
        lm = load_model(str(base), device="cpu", quantize=quantize, lora_rank=4)
        settings = dataclasses.replace(SETTINGS, gradient_checkpointing=recompute, epochs=2)
        records = run(lm, settings)
        own = {n: p.detach() for n, p in lm.model.named_parameters() if p.requires_grad}
        found.append((records, own))
    (kept, one), (recomputed, other) = found
    assert kept[0].grad_norm > 0.01
    assert [r.grad_norm for r in kept] == [r.grad_norm for r in recomputed]
    assert all(torch.equal(one[name], other[name]) for name in one)
    moved = [float(p.abs().max()) for name, p in other.items() if "lora_B" in name]
    assert min(moved) > 0, "from the first layer to the last"


def test_an_adapter_steps_in_the_backward_and_with_small_states(base):
    settings = dataclasses.replace(SETTINGS, step_in_backward=True, optimizer="adamw-8bit")
    lm = load_model(str(base), device="cpu", lora_rank=64)  # 4096 values: states of 8 bits
    records = run(lm, settings)
    assert records[-1].loss < records[0].loss


def test_what_is_written_is_an_adapter_that_loads_merged_and_continues(base, tmp_path):
    lm = load_model(str(base), device="cpu", lora_rank=4, lora_alpha=4)
    run(lm)
    write_weights(lm, tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists(), "small"
    loaded = load_model(str(tmp_path / "adapter"), device="cpu")
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(log_probs(loaded), log_probs(lm), atol=1e-4, rtol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.tensor([DATA["forget"][0].input_ids])
    with lm.generating() as ours:
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)

    second = load_model(str(tmp_path / "adapter"), device="cpu", lora_rank=2)
    assert torch.equal(log_probs(second), log_probs(loaded))
    run(second)
    write_weights(second, tmp_path / "second")
    again = load_model(str(tmp_path / "second"), device="cpu")
    torch.testing.assert_close(log_probs(again), log_probs(second), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_an_adapter_on_4_bit_weights_comes_back_on_4_bit_weights(base, tmp_path):
    lm = load_model(str(base), device="cpu", quantize="4bit", lora_rank=4)
    run(lm)
    write_weights(lm, tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"), device="cpu")
    assert loaded.quantized
    torch.testing.assert_close(log_probs(loaded), log_probs(lm), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="takes no second one"):
        load_model(str(tmp_path / "adapter"), device="cpu", lora_rank=4)


def test_weights_of_the_best_step_come_back_in_place(base, tmp_path):
    lm = load_model(str(base), device="cpu", lora_rank=4)
    run(lm)
    expected = log_probs(lm)
    write_weights(lm, tmp_path / "best")
    run(lm)
    assert not torch.equal(log_probs(lm), expected)
    read_weights(lm, tmp_path / "best")
    assert torch.equal(log_probs(lm), expected)


def test_a_merged_adapter_is_a_plain_model(base, tmp_path):
    lm = load_model(str(base), device="cpu", lora_rank=4)
    run(lm)
    expected = log_probs(lm)
    merge_adapter(lm)
    torch.testing.assert_close(log_probs(lm), expected, atol=1e-4, rtol=1e-4)
    write_weights(lm, tmp_path / "model")
    assert not (tmp_path / "model/adapter_config.json").exists()
    loaded = load_model(str(tmp_path / "model"), device="cpu")
    torch.testing.assert_close(log_probs(loaded), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_on_the_lm_head_is_refused():
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("Llama"), config)
    with pytest.raises(UserError, match="the LM head carries an adapter"):
        CausalLM(model)


@pytest.mark.slow
def test_the_command_line_trains_an_adapter_and_its_run_loads_like_any_other(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "base")
    data = write_jsonl(tmp_path / "facts.jsonl", FACTS)
    verbs = {
        "unlearn": ["--forget", f"{data}[:4]", "--retain", f"{data}[4:]", "--epochs", "2",
                    "--batch-size", "4", "--max-new-tokens", "4", "--report-records", "4"],
        "evaluate": ["--forget", f"{data}[:4]", "--max-new-tokens", "4", "--no-utility"],
    }  # fmt: skip

    def run(verb: str, name: str, *more: str) -> int:
        return main([verb, "--model", name, *verbs[verb], "--json", *more])

    for name, more in {
        "lora": ["--eval-every", "1", "--keep-best", "retain.probability", "--save-every", "1"],
        "merged": ["--merge"],
        "qlora": ["--quantize", "4bit", "--dtype", "bf16", "--gradient-checkpointing"],
    }.items():
        where = tmp_path / name
        more = ["--lora-rank", "4", "--lr", "1e-2", "--output", str(where), *more]
        assert run("unlearn", str(model), *more) == 0, name
        after = json.loads(capsys.readouterr().out)["after"]["forget"]["probability"]
        assert (where / "model/adapter_config.json").exists() == (name != "merged")
        dtype = ["--dtype", "bf16"] if name == "qlora" else []
        assert run("evaluate", str(where), *dtype) == 0
        out = json.loads(capsys.readouterr().out)
        found = out["metrics"]["forget probability"]
        assert found == pytest.approx(after, rel=0.02 if name == "qlora" else 1e-3), name
    assert run("unlearn", str(tmp_path / "lora"), "--output", str(tmp_path / "more")) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quantize", "4bit"], "train beside them with --lora-rank 16"),
        (["--lora-rank", "-1"], "lora_rank must be 0"),
        (["--lora-alpha", "8"], "add --lora-rank 16"),
        (["--merge"], "it takes --lora-rank, and no --quantize"),
        (["--merge", "--lora-rank", "4", "--quantize", "4bit"], "and no --quantize"),
    ],
)
def test_what_cannot_work_is_refused_before_loading(tmp_path, capsys, flags, message):
    data = write_jsonl(tmp_path / "facts.jsonl", FACTS)
    save_tiny_model(tmp_path / "base")
    command = ["finetune", "--model", str(tmp_path / "base"), "--train", str(data), "--dry-run"]
    assert main([*command, "--output", str(tmp_path / "run"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_installation(base, monkeypatch):
    monkeypatch.setattr("npo_fast.model.adapters.find_spec", lambda name: None)
    with pytest.raises(UserError, match="LoRA needs peft: pip install peft"):
        load_model(str(base), lora_rank=4)
    with pytest.raises(UserError, match="quantize 4bit needs bitsandbytes: pip install bits"):
        load_model(str(base), quantize="4bit")


def test_an_adapter_of_virtual_tokens_is_refused(base, tmp_path):
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, base_model_name_or_path=str(base)
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="PROMPT_TUNING, which cannot be merged"):
        load_model(str(tmp_path), device="cpu")


def test_a_head_that_trains_beside_an_adapter_is_the_one_that_counts():
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_model("Llama"), config)
    lm = CausalLM(model)
    lm.log_probs(*pack(sequences(3, 0), 1000)).sum().backward()
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.grad is not None
