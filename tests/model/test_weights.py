"""Every tensor of a model comes from its files: what is missing is named, and not drawn."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from npo_fast.cli import main
from npo_fast.errors import UserError
from npo_fast.model.adapters import read_weights, write_weights
from npo_fast.model.load import load_model
from tests.helpers import FACTS, calm_model, save_tiny_model, slow_but, tiny_model, write_jsonl

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
LORA = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("home") / "base")


def changed(folder: Path, target: Path, change, file: str = "model.safetensors") -> Path:
    """A copy of a model whose tensors ``change`` has gone over."""
    shutil.copytree(folder, target)
    tensors = load_file(target / file)
    change(tensors)
    save_file(tensors, target / file, metadata={"format": "pt"})
    return target


CHANGES = {
    "renamed": (lambda t: t.update(x=t.pop(UP)), ["lack", UP, "no place", "1 tensor: x"]),
    "missing": (lambda t: [t.pop(UP), t.pop(NORM)], ["lack", f"2 tensors: {UP}, {NORM}"]),
    "many missing": (lambda t: [t.pop(k) for k in list(t) if "layers.1" in k], ["9 tensors", "…"]),
    "head missing": (lambda t: t.pop("lm_head.weight"), ["lack", "lm_head.weight"]),
    "a layer more": (
        lambda t: t.update({UP.replace("1", "2"): t[UP].clone()}),
        ["no place", UP.replace("1", "2")],
    ),
    "a bias that the configuration denies": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
        ["no place", "q_proj.bias"],
    ),
    "another shape": (lambda t: t.update({NORM: torch.ones(3)}), [NORM, "(3,), not (32,)"]),
}


@pytest.mark.parametrize("kind", slow_but(["renamed", "another shape"], CHANGES))
def test_tensors_that_do_not_fit_are_named(base, tmp_path, kind):
    change, phrases = CHANGES[kind]
    folder = changed(base, tmp_path / "model", change)
    with pytest.raises(UserError, match="do not fit") as error:
        load_model(str(folder), device="cpu")
    for phrase in [*phrases, str(folder)]:
        assert phrase in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_does_not_begin_with_weights_that_nobody_trained(base, tmp_path, capfd):
    folder = changed(base, tmp_path / "model", lambda t: t.update(x=t.pop(UP)))
    facts = write_jsonl(tmp_path / "facts.jsonl", FACTS)
    output = tmp_path / "run"
    for verb, data in (("finetune", "--train"), ("evaluate", "--forget"), ("attack", "--forget")):
        assert main([verb, "--model", str(folder), data, str(facts), "--output", str(output)]) == 2
        error = capfd.readouterr().err
        assert UP in error
        assert "LOAD REPORT" not in error, "one line says it"
    assert not output.exists()


def test_tied_weights_and_towers_of_other_senses_may_be_absent_or_present(tmp_path):
    """The head of a tied model is in its files or not; a vision tower is left out."""
    tiny_model("Llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    expected = load_model(str(tmp_path / "tied"), device="cpu").model.state_dict()

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.vision_tower.layers.0.weight"] = torch.ones(2)
        tensors["mtp.layers.0.weight"] = torch.ones(2)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    folder = changed(tmp_path / "tied", tmp_path / "more", add)
    loaded = load_model(str(folder), device="cpu").model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(torch.equal(w, expected[name]) for name, w in loaded.state_dict().items())


def test_what_is_read_back_into_a_model_is_all_of_it(base, tmp_path):
    lm = load_model(str(base), device="cpu")
    before = {name: w.clone() for name, w in lm.model.state_dict().items()}
    folder = changed(base, tmp_path / "model", lambda t: t.pop(UP))
    with pytest.raises(UserError, match=UP):
        read_weights(lm, folder)
    assert all(torch.equal(w, before[name]) for name, w in lm.model.state_dict().items())


ADAPTERS = {
    "renamed": (lambda t: t.update({LORA.replace("A", "C"): t.pop(LORA)}), "lack tensors"),
    "missing": (lambda t: t.pop(LORA), "lack tensors of the adapter"),
    "one more": (lambda t: t.update({LORA.replace("1", "7"): t[LORA].clone()}), "no place"),
    "another shape": (lambda t: t.update({LORA: t[LORA][:, :-1].contiguous()}), "size mismatch"),
}


@pytest.mark.parametrize("kind", slow_but(["renamed"], ADAPTERS))
@pytest.mark.parametrize("quantize", slow_but(["none"], ["none", "4bit"]))
def test_tensors_of_an_adapter_that_do_not_fit_are_named(tmp_path, kind, quantize):
    change, message = ADAPTERS[kind]
    torch.manual_seed(0)
    model = calm_model("Llama", hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path / "base")
    lm = load_model(str(tmp_path / "base"), device="cpu", lora_rank=2, quantize=quantize)
    write_weights(lm, tmp_path / "adapter")
    load_model(str(tmp_path / "adapter"), device="cpu")
    read_weights(lm, tmp_path / "adapter")
    folder = changed(
        tmp_path / "adapter", tmp_path / "changed", change, "adapter_model.safetensors"
    )
    for load in (lambda: load_model(str(folder), device="cpu"), lambda: read_weights(lm, folder)):
        with pytest.raises(UserError, match=message) as error:
            load()
        assert "mlp.up_proj.lora_" in str(error.value)
        assert str(folder) in str(error.value)


def gguf_file(file: Path, changes: dict[str, tuple[int, ...] | None]) -> str:
    """A random Llama of two layers; ``changes`` are shapes of tensors, None for none."""
    gguf = pytest.importorskip("gguf")
    shapes = {"token_embd": (97, 32), "output_norm": (32,), "output": (97, 32)}
    for i in range(2):
        of_layer = {
            "attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32),
            "attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (48, 32), "ffn_up": (48, 32),
            "ffn_down": (32, 48),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in of_layer.items()}
    writer = gguf.GGUFWriter(str(file), "llama")
    for name, value in {
        "context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
        "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 8,
        "vocab_size": 97,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    random = np.random.default_rng(0)
    for name, shape in {**shapes, **changes}.items():
        if shape is not None:
            tensor = random.standard_normal(shape).astype(np.float32) / 10
            writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


@pytest.mark.slow
def test_tensors_of_a_gguf_file_that_do_not_fit_are_named(tmp_path):
    for sound in ({}, {"output": None}, {"rope_freqs": (4,)}):  # the second is tied
        load_model(gguf_file(tmp_path / "sound.gguf", sound), device="cpu")
    for wrong in ({"blk.1.ffn_up": None}, {"blk.1.ffn_up": (48, 31)}):
        with pytest.raises(UserError, match="model.layers.1.mlp.up_proj.weight"):
            load_model(gguf_file(tmp_path / "wrong.gguf", wrong), device="cpu")
