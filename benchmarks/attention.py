"""What attention on a pack costs: 64 sequences of 64 tokens beside one of 4096.

Forward and backward of attention alone (heads of SmolLM2-135M) and of a small Llama, each three
ways: within the sequences, as npo_fast does; over one sequence of all tokens; and with the dense
mask of the pack that transformers makes for SDPA. "within" and "dense mask" must agree to 1e-4.

    python benchmarks/attention.py
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from npo_fast.bench.provenance import provenance
from npo_fast.bench.timing import interleaved
from npo_fast.data import PackedBatch, TokenizedExample, pack
from npo_fast.model.attention import packed_attention
from npo_fast.model.causal_lm import CausalLM

TOKENS, LENGTH = 4096, 64
HEADS, KEY_VALUE_HEADS, DIM = 9, 3, 64
TOLERANCE = 1e-4
VOCABULARY = 1024


@dataclass(frozen=True)
class Settings:
    rounds: int = 5
    layers: int = 4
    """Of the small Llama."""
    output: Path = Path("benchmarks/results/attention.json")


def sequence_lengths() -> dict[str, list[int]]:
    """Equal lengths go through SDPA as one block, unequal ones one by one."""
    unequal = [LENGTH + (37 * i) % 63 - 31 for i in range(TOKENS // LENGTH - 1)]
    return {
        "within 64 equal": [LENGTH] * (TOKENS // LENGTH),
        "within 64 unequal": sorted([*unequal, TOKENS - sum(unequal)]),
        "one of 4096": [TOKENS],
    }


def attention_alone() -> dict[str, Callable[[], Tensor]]:
    query = torch.randn(1, HEADS, TOKENS, DIM, requires_grad=True)
    key, value = (
        torch.randn(1, KEY_VALUE_HEADS, TOKENS, DIM, requires_grad=True) for _ in range(2)
    )
    inputs = (query, key, value)
    position = torch.arange(TOKENS)
    same_sequence = position[:, None] // LENGTH == position[None, :] // LENGTH
    mask = same_sequence & (position[:, None] >= position[None, :])

    def gradient(out: Tensor) -> Tensor:
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        return torch.cat([part.flatten() for part in gradients])

    def within(lengths: tuple[int, ...]) -> Tensor:
        return gradient(
            packed_attention(torch.nn.Module(), *inputs, None, sequence_lengths=lengths)[0]
        )

    def dense() -> Tensor:
        k, v = (x.repeat_interleave(HEADS // KEY_VALUE_HEADS, dim=1) for x in (key, value))
        return gradient(F.scaled_dot_product_attention(query, k, v, mask))

    ways: dict[str, Callable[[], Tensor]] = {
        name: lambda lengths=tuple(lengths): within(lengths)
        for name, lengths in sequence_lengths().items()
    }
    return {**ways, "dense mask": dense}


def small_llama(layers: int) -> dict[str, Callable[[], Tensor]]:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HEADS * DIM, intermediate_size=1536,
        num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=TOKENS,
    )  # fmt: skip
    ids = torch.randint(VOCABULARY, (TOKENS,)).tolist()
    packs = {name: packed(lengths, ids) for name, lengths in sequence_lengths().items()}
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    lms = {attention: CausalLM(model, attention) for attention in ("auto", "sdpa")}

    def step(attention: str, batch: PackedBatch) -> Tensor:
        model.set_attn_implementation(lms[attention].attention)
        states = lms[attention].states(batch)
        parameters = list(lms[attention].decoder.parameters())
        return torch.autograd.grad(states.square().sum(), parameters)[1]

    ways: dict[str, Callable[[], Tensor]] = {
        name: lambda batch=batch: step("auto", batch) for name, batch in packs.items()
    }
    return {**ways, "dense mask": lambda: step("sdpa", packs["within 64 equal"])}


def packed(lengths: list[int], ids: list[int]) -> PackedBatch:
    rest = iter(ids)
    sequences = [
        TokenizedExample(tuple(next(rest) for _ in range(n)), 1, i) for i, n in enumerate(lengths)
    ]
    (batch,) = pack(sequences, max_tokens=TOKENS)
    return batch


def measure(ways: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, Any]:
    gradients = {name: way() for name, way in ways.items()}
    ours, dense = gradients["within 64 equal"], gradients["dense mask"]
    difference = float((ours - dense).abs().max() / dense.abs().max())
    if not difference <= TOLERANCE:
        raise SystemExit(f"not timed: gradients differ by {difference:.1e}")
    times = interleaved(ways, rounds, torch.device("cpu"))
    return {
        "relative_difference": difference,
        "median_ms": {name: measured.median_ms for name, measured in times.items()},
        "over_within_64_equal": {
            name: measured.ratio_to(times["within 64 equal"]) for name, measured in times.items()
        },
    }


def main(settings: Settings) -> None:
    result = {
        "what": f"forward and backward on {TOKENS} tokens, fp32",
        "provenance": provenance(),
        "attention alone": measure(attention_alone(), settings.rounds),
        f"Llama of {settings.layers} layers": measure(
            small_llama(settings.layers), settings.rounds
        ),
    }
    settings.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
