"""Small random models of many families, and benchmark data where it lies beside the checkout."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

SHARED = Path(os.environ.get("NPO_FAST_SHARED", Path(__file__).parents[2] / "shared"))
VOCABULARY = 97

if not torch.cuda.is_available():
    # before the first import of Triton: its kernels run on the CPU, in the interpreter
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """``new_empty`` and ``empty_like`` return NaN: an element that no kernel writes shows."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: object, **kwargs: object) -> torch.Tensor:
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: set NPO_FAST_SHARED to the folder that holds {name}/")
    return folder


@pytest.fixture(scope="session")
def tofu() -> Path:
    """TOFU's JSON files."""
    return _shared("tofu")


@pytest.fixture(scope="session")
def tofu_logs() -> Path:
    """Published evaluation logs."""
    return _shared("tofu_logs")


def tiny_model(family: str, **overrides: object) -> transformers.PreTrainedModel:
    """A random two-layer model whose weights are large enough to tell its features apart."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    no_gqa = {k: v for k, v in sizes.items() if k not in ("num_key_value_heads", "head_dim")}
    extra: dict[str, dict[str, object]] = {
        "Llama": {**sizes},
        "Mistral": {**sizes, "sliding_window": 6},
        "Mixtral": {**sizes},
        "GptOss": {**sizes, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6},
        "Qwen2Moe": {**sizes, "num_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16,
                     "use_sliding_window": True, "max_window_layers": 2},
        "FalconH1": {**sizes, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8,
                     "mamba_chunk_size": 8},
        "Doge": {**sizes, "keep_window_size": 4},
        "Llama4Text": {**sizes, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "Qwen2": {**sizes},
        "Qwen3": {**sizes},
        "Gemma2": {
            **sizes,
            "sliding_window": 6,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 8,
        },
        "GPTNeoX": {**no_gqa},
        "Phi": {**no_gqa},
        "Cohere": {**sizes, "logit_scale": 0.25},
        "Granite": {**sizes, "logits_scaling": 3.0},
        "GPT2": {
            "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        "Bloom": {
            "vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**extra[family], **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).add_(torch.randn_like(parameter) * 0.05)
    return model.eval()
