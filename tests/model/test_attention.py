"""Attention on a pack costs what its sequences cost, whoever computes it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from npo_fast.data import PackedBatch, TokenizedExample, pack
from npo_fast.errors import UserError
from npo_fast.model.attention import NAME as PACKED
from npo_fast.model.attention import packed_attention, set_attention
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.choice import (
    Demands,
    Machine,
    attentions,
    demands_of,
    flash_version,
    machine_of,
    varlen_obstacle,
)
from npo_fast.model.varlen import NAME as VARLEN
from npo_fast.model.varlen import attend, parameters, varlen_attention
from tests.helpers import VOCABULARY, tiny_model

UNEQUAL = [3 + (37 * i) % 59 for i in range(64)]
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def packed(lengths: list[int]) -> PackedBatch:
    (batch,) = pack(
        [
            TokenizedExample(tuple(torch.randint(3, VOCABULARY, (n,)).tolist()), 1, i)
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


@pytest.mark.slow
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


def attention_by_bounds(
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
    AttentionInterface.register("varlen_here", attention_by_bounds)
    model = tiny_model("Llama")
    batch = packed([9, 2, 17, 9])
    expected = CausalLM(model).log_probs(batch)
    lm = CausalLM(model, "varlen_here", probe=False)
    lm.attention = name  # transformers refuses the name itself where there is no GPU
    torch.testing.assert_close(lm.log_probs(batch), expected)


def test_transformers_takes_the_bounds_by_these_names() -> None:
    assert set(BOUNDS) <= set(inspect.signature(_flash_attention_forward).parameters)


SINCE_2_11 = frozenset({"scale", "window_size"})
HOPPER = Machine("cuda", (9, 0), varlen=SINCE_2_11)
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("major", "installed", "version"),
    [
        (8, {2, 3, 4}, 2), (9, {2, 3, 4}, 3), (9, {2, 4}, 4), (9, {2}, 2), (10, {2, 3, 4}, 4),
        (10, {2}, 2), (11, {2, 4}, 4), (12, {2, 4}, 2), (12, {4}, None), (7, {2}, None),
        (9, set(), None),
    ],
)  # fmt: skip
def test_each_gpu_gets_the_flash_attention_written_for_it(
    major: int, installed: set[int], version: int | None
) -> None:
    machine = Machine("cuda", (major, 0), flash=frozenset(installed))
    assert flash_version(machine, BF16, Demands()) == version


@pytest.mark.parametrize(
    ("major", "demands", "version"),
    [
        (9, Demands(dropout=True), 2), (10, Demands(dropout=True), 2),
        (9, Demands(softcap=True), 3),
        (10, Demands(softcap=True), 2), (10, Demands(frozenset({256})), 2),
        (9, Demands(sinks=True), None),
        (9, Demands(frozenset({128, 512})), None), (9, Demands(frozenset({20})), None),
    ],
)  # fmt: skip
def test_a_flash_attention_that_lacks_what_a_model_needs_is_passed_over(
    major: int, demands: Demands, version: int | None
) -> None:
    machine = Machine("cuda", (major, 0), flash=frozenset({2, 3, 4}))
    assert flash_version(machine, BF16, demands) == version


@pytest.mark.parametrize(
    ("machine", "dtype", "order"),
    [
        (HOPPER, BF16, [VARLEN, PACKED]),
        (HOPPER, torch.float16, [VARLEN, PACKED]),
        (HOPPER, torch.float32, [PACKED]),
        (replace(HOPPER, flash=frozenset({2})), BF16, ["flash_attention_2", VARLEN, PACKED]),
        (replace(HOPPER, flash=frozenset({2})), torch.float32, [PACKED]),
        (replace(HOPPER, capability=(7, 5)), BF16, [PACKED]),
        (replace(HOPPER, varlen=None), BF16, [PACKED]),
        (replace(HOPPER, built=False), BF16, [PACKED]),
        (Machine("cuda", amd=True, varlen=SINCE_2_11), BF16, [PACKED]),
        (
            Machine("cuda", amd=True, flash=frozenset({2, 3}), varlen=SINCE_2_11),
            BF16,
            ["flash_attention_2", PACKED],
        ),
        (machine_of(torch.device("cpu")), BF16, [PACKED]),
    ],
)
def test_a_package_goes_before_pytorchs_own_and_that_before_one_call_a_length(
    machine: Machine, dtype: torch.dtype, order: list[str]
) -> None:
    assert list(attentions(machine, dtype, Demands())) == order


def test_a_model_that_takes_no_package_takes_pytorchs_own() -> None:
    machine = replace(HOPPER, flash=frozenset({2, 3, 4}))
    assert list(attentions(machine, BF16, Demands(), flash=False)) == [VARLEN, PACKED]


@pytest.mark.parametrize(
    ("family", "overrides", "demands", "why"),
    [
        ("Llama", {}, Demands(frozenset({8})), None),
        ("Llama", {"attention_dropout": 0.1}, Demands(frozenset({8}), dropout=True), "dropout"),
        ("Llama", {"head_dim": 12}, Demands(frozenset({12})), "heads of 12"),
        ("GPT2", {}, Demands(frozenset({8}), dropout=True), "dropout"),
        ("GPTNeoX", {}, Demands(frozenset({8})), None),
        ("Mistral", {}, Demands(frozenset({8}), window=True), None),
        ("Granite", {"attention_multiplier": 0.5}, Demands(frozenset({8}), scaled=True), None),
        ("Gemma2", {}, Demands(frozenset({8}), softcap=True, window=True), "softcap"),
        ("GptOss", {}, Demands(frozenset({8}), sinks=True, window=True), "sinks"),
    ],
)
def test_what_a_model_needs_decides_before_it_runs(
    family: str, overrides: dict[str, object], demands: Demands, why: str | None
) -> None:
    model = tiny_model(family, **overrides)
    found = demands_of(model, model.config)
    assert found == demands
    obstacle = varlen_obstacle(HOPPER, BF16, found)
    assert obstacle is None if why is None else obstacle is not None and why in obstacle


@pytest.mark.parametrize("demands", [Demands(window=True), Demands(scaled=True)])
def test_windows_and_scales_need_a_varlen_that_has_them(demands: Demands) -> None:
    assert VARLEN in attentions(HOPPER, BF16, demands)
    without = replace(HOPPER, varlen=frozenset({"is_causal"}))
    assert VARLEN in attentions(without, BF16, Demands())
    assert VARLEN not in attentions(without, BF16, demands)


@pytest.mark.parametrize(
    ("machine", "dtype", "demands", "words"),
    [
        (Machine("cpu"), BF16, Demands(), ("on cpu", "--attention auto")),
        (replace(HOPPER, capability=(7, 5)), BF16, Demands(), ("7.5", "--attention auto")),
        (replace(HOPPER, varlen=None), BF16, Demands(), ("upgrade to 2.10",)),
        (HOPPER, torch.float32, Demands(), ("float32", "--dtype bf16")),
        (HOPPER, BF16, Demands(softcap=True), ("softcap", "--attention auto")),
    ],
)
def test_what_keeps_varlen_from_running_is_reported_with_a_remedy(
    machine: Machine, dtype: torch.dtype, demands: Demands, words: tuple[str, ...]
) -> None:
    why = varlen_obstacle(machine, dtype, demands)
    assert why is not None
    assert all(word in why for word in words)


def test_varlen_by_name_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(UserError, match=f"attention {VARLEN} cannot run here: .* on cpu: name"):
        CausalLM(tiny_model("Llama"), VARLEN)


def alone(q, k, v, cu_seqlens, longest, scale, window):
    """Attention in fp32 of each sequence by itself: (T, heads, dim) -> (T, heads, dim)."""
    assert q.dim() == k.dim() == v.dim() == 3
    assert q.shape[1:] == k.shape[1:] == v.shape[1:]
    assert cu_seqlens.dtype == torch.int32
    lengths = cu_seqlens.diff().tolist()
    assert longest == max(lengths)
    assert sum(lengths) == len(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for one in zip(*(x.float().split(lengths) for x in (q, k, v)), strict=True):
        a, b, c = (x.transpose(0, 1) for x in one)
        position = torch.arange(a.shape[1])
        distance = position[:, None] - position[None, :]
        seen = (distance >= 0) & (distance <= (longest if window < 0 else window))
        scores = (a @ b.mT * scale).masked_fill(~seen, -torch.inf)
        out.append((scores.softmax(-1) @ c).transpose(0, 1))
    return torch.cat(out).to(q.dtype)


def varlen_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    assert is_causal
    assert cu_seq_k is cu_seq_q
    assert max_k == max_q
    return alone(query, key, value, cu_seq_q, max_q, None, -1)


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1),
):  # fmt: skip
    assert cu_seq_k is cu_seq_q
    assert max_k == max_q
    left, right = window_size
    assert right == 0
    # it takes fewer heads of keys as they are, as a run on a GPU has shown
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return alone(query, key, value, cu_seq_q, max_q, scale, left)


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return varlen_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
    )


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("lengths", [[9, 2, 17, 9, 1], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("key_value_heads", [4, 2])
@pytest.mark.parametrize(
    ("varlen", "scaling", "window"),
    [
        (varlen_2_10, None, None),
        (varlen_2_10, 8**-0.5, 17),  # a window that no sequence reaches
        *(
            (varlen, scaling, window)
            for varlen in (varlen_2_11, varlen_2_13)
            for scaling, window in ((None, None), (0.7, None), (0.7, 4), (None, 1), (0.7, 17))
        ),
    ],
)
def test_every_varlen_attn_gives_what_packed_attention_gives(
    varlen, scaling: float | None, window: int | None, key_value_heads: int, lengths: list[int]
) -> None:
    tokens, bounds = sum(lengths), bounds_of(lengths)
    q = torch.randn(1, 4, tokens, 8, requires_grad=True)
    k, v = (torch.randn(1, key_value_heads, tokens, 8, requires_grad=True) for _ in "kv")
    expected, _ = packed_attention(
        torch.nn.Module(), q, k, v, None, scaling,
        sliding_window=window, sequence_lengths=tuple(lengths),
    )  # fmt: skip
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    found = attend(varlen, *rows, bounds, max(lengths), scaling, window)
    torch.testing.assert_close(found[None], expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(found[None], (q, k, v), upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (q, k, v), upstream))


@pytest.mark.parametrize(("scaling", "window"), [(0.7, None), (None, 4)])
def test_a_varlen_without_scale_and_window_is_not_asked_for_them(
    scaling: float | None, window: int | None
) -> None:
    q = torch.randn(5, 4, 8)
    with pytest.raises(NotImplementedError, match="this PyTorch has no"):
        attend(varlen_2_10, q, q, q, bounds_of([5]), 5, scaling, window)


def latent_model() -> transformers.PreTrainedModel:
    """Multi-head latent attention: values are narrower than keys."""
    config = transformers.DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, first_k_dense_replace=2,
        initializer_range=0.3, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Granite", "DeepseekV3"])
def test_a_model_with_varlen_attention_knows_where_sequences_end(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", varlen_2_13)
    scale = {"attention_multiplier": 1.5} if family == "Granite" else {}
    model = latent_model() if family == "DeepseekV3" else tiny_model(family, **scale)
    model.to(BF16)
    batch = packed([9, 2, 17, 9])
    expected = CausalLM(model, probe=False).log_probs(batch)
    lm = CausalLM(model, probe=False)
    assert set_attention(model, VARLEN)
    lm.attention = VARLEN
    assert (lm.log_probs(batch) - expected).abs().max() < 0.1
    lm.packs = False  # sequences run one at a time, without bounds
    assert (lm.log_probs(batch) - expected).abs().max() < 0.1
    with lm.generating() as native:
        assert native.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == VARLEN
    assert CausalLM(model, probe=False).native_attention == "sdpa"


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_this_pytorch_takes_the_arguments_that_it_is_given(key_value_heads: int) -> None:
    module = pytest.importorskip("torch.nn.attention.varlen")
    assert parameters(module.varlen_attn) & {"is_causal", "window_size"}
    q = torch.empty(1, 4, 12, 8, dtype=BF16, device="meta", requires_grad=True)
    k = torch.empty(1, key_value_heads, 12, 8, dtype=BF16, device="meta", requires_grad=True)
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    out, _ = varlen_attention(
        torch.nn.Module(), q, k, k, None, cu_seq_lens_q=bounds, max_length_q=9
    )
    assert out.shape == (1, 12, 4, 8)
    dq, dk = torch.autograd.grad(out.float().sum(), (q, k))
    assert (dq.shape, dk.shape) == (q.shape, k.shape)


@pytest.mark.parametrize(
    "given", [{"softcap": 30.0}, {"dropout": 0.1}, {"s_aux": torch.zeros(4)}], ids=str
)
def test_varlen_refuses_what_the_kernel_would_leave_out(given: dict[str, object]) -> None:
    q = torch.zeros(1, 4, 5, 8, dtype=BF16)
    with pytest.raises(NotImplementedError, match=f"{next(iter(given))} is not supported"):
        varlen_attention(torch.nn.Module(), q, q, q, None, **given)


def test_auto_goes_from_one_that_a_model_cannot_take_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("npo_fast.model.causal_lm.attentions", lambda *_: iter([VARLEN, PACKED]))
    with pytest.warns(UserWarning, match=f"does not run with {VARLEN}: it takes {PACKED}"):
        lm = CausalLM(tiny_model("Llama"))  # in fp32
    assert lm.attention == PACKED
    assert lm.packs


def test_the_doctor_says_which_attention_a_device_gets() -> None:
    pytest.importorskip("tyro", reason="the command line")
    from npo_fast.cli.doctor import examine, report

    found = examine()
    assert found["attention"]["cpu"] == PACKED
    assert len(found["attention"]) == len(found["devices"])
    assert f"cpu           {PACKED}" in report(found)
