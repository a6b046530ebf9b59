"""Attention on a pack costs what its sequences cost, whoever computes it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from npo_fast.data import PackedBatch, Sequence, pack
from npo_fast.model.attention import packed_attention
from npo_fast.model.causal_lm import CausalLM, flash_version
from tests.conftest import VOCABULARY, tiny_model

UNEQUAL = [3 + (37 * i) % 59 for i in range(64)]
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def packed(lengths: list[int]) -> PackedBatch:
    (batch,) = pack(
        [
            Sequence(tuple(torch.randint(3, VOCABULARY, (n,)).tolist()), 1, i)
            for i, n in enumerate(lengths)
        ],
        max_tokens=sum(lengths),
    )
    return batch


class Largest(TorchDispatchMode):
    """The most elements that a tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = (one.numel() for one in tree_leaves(out) if isinstance(one, Tensor))
        self.elements = max(self.elements, *made, 0)
        return out


@pytest.mark.parametrize("lengths", [[64] * 64, UNEQUAL], ids=["equal", "unequal"])
def test_nothing_as_large_as_tokens_squared_is_made_for_a_pack(lengths: list[int]) -> None:
    lm = CausalLM(tiny_model("Llama"))
    batch = packed(lengths)
    with Largest() as largest:
        lm.states(batch).sum().backward()
    config = lm.model.config
    widest = max(config.intermediate_size, config.hidden_size, VOCABULARY)
    assert largest.elements <= sum(lengths) * widest < sum(lengths) ** 2


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_scores_are_those_of_the_sequences_alone(softcap: float | None) -> None:
    heads, dim, length = 4, 8, 64
    q = torch.randn(1, heads, 64 * length, dim, requires_grad=True)
    k, v = (torch.randn(1, 2, 64 * length, dim, requires_grad=True) for _ in "kv")
    with Largest() as largest:
        out, _ = packed_attention(
            torch.nn.Module(), q, k, v, None, softcap=softcap, sequence_lengths=(length,) * 64
        )
        out.sum().backward()
    within = q.numel() if softcap is None else 64 * heads * length**2
    assert largest.elements <= within


@contextmanager
def compiling_nothing() -> Iterator[None]:
    """FlexAttention without its minute of compilation; the mask and the numbers are the same."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@torch.no_grad()  # PyTorch has no backward of FlexAttention on a CPU
def test_flex_attention_masks_a_pack_as_we_do() -> None:
    model = tiny_model("Llama")
    batch = packed([9, 2, 17, 9])
    expected = CausalLM(model).log_probs(batch)
    with compiling_nothing():
        flex = CausalLM(model, "flex_attention")
        assert flex.packs
        torch.testing.assert_close(flex.log_probs(batch), expected)


def varlen_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs
):
    """What FlashAttention makes of the bounds of a pack; it is given no mask."""
    assert attention_mask is None
    lengths = cu_seq_lens_q.diff()
    assert torch.equal(cu_seq_lens_q, kwargs["cu_seq_lens_k"])
    assert cu_seq_lens_q.dtype == torch.int32
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == int(lengths.max())
    return packed_attention(
        module, query, key, value, None, scaling, sequence_lengths=tuple(lengths.tolist())
    )


@pytest.mark.parametrize(
    "name",
    [*(f"flash_attention_{v}" for v in (2, 3, 4)), "kernels-community/flash-attn3"],
)
def test_flash_attention_is_told_where_sequences_end(name: str) -> None:
    AttentionInterface.register("varlen_here", varlen_attention)
    model = tiny_model("Llama")
    batch = packed([9, 2, 17, 9])
    expected = CausalLM(model).log_probs(batch)
    lm = CausalLM(model, "varlen_here", probe=False)
    lm.attention = name  # transformers refuses the name itself where there is no GPU
    torch.testing.assert_close(lm.log_probs(batch), expected)


def test_transformers_takes_the_bounds_by_these_names() -> None:
    assert set(BOUNDS) <= set(inspect.signature(_flash_attention_forward).parameters)


@pytest.mark.parametrize(
    ("major", "installed", "version"),
    [
        (8, {2, 3, 4}, 2), (9, {2, 3, 4}, 3), (9, {2, 4}, 2), (10, {2, 3, 4}, 4), (10, {2}, 2),
        (12, {2, 4}, 2), (7, {2}, None), (9, set(), None),
    ],
)  # fmt: skip
def test_each_gpu_gets_the_flash_attention_written_for_it(
    major: int, installed: set[int], version: int | None
) -> None:
    assert flash_version(major, installed.__contains__) == version
