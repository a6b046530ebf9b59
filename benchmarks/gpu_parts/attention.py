"""Part 6: attention on a pack of TOFU's lengths, in one launch or with one call for each length.

Forward and backward, bf16. The calls for each length are many small launches, so that their time is
the host's: it is included, as it is in a training step.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import npo_fast.model.causal_lm  # noqa: F401  (registers the attentions)
from gpu_parts.measure import Call, free_memory, interleaved, peak_mib, summary
from gpu_parts.record import Record
from gpu_parts.tofu_lengths import pack_lengths

TOKENS, TINY_TOKENS = 4096, 128
HEADS = ((32, 32), (32, 8))  # of queries, and of keys and values
DIM, TINY_DIM = 128, 16
PACKED, VARLEN = "npo_fast_packed", "npo_fast_varlen"
RAW, DENSE = "torch varlen_attn", "SDPA with the pack's dense mask"
TOLERANCE = 2e-2

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(record: Record, device: torch.device, tiny: bool, job: str) -> None:
    for heads, key_heads in HEADS:
        name = f"{heads} heads, {key_heads} of keys"
        measure = partial(one_case, record, name, heads, key_heads, device, tiny)
        record.attempt(name, measure)
        free_memory(device)


def one_case(
    record: Record, name: str, heads: int, key_heads: int, device: torch.device, tiny: bool
) -> None:
    tokens, dim = (TINY_TOKENS, TINY_DIM) if tiny else (TOKENS, DIM)
    lengths = pack_lengths(tokens)
    options = {"device": device, "dtype": torch.bfloat16}
    inputs = [
        torch.randn(1, count, tokens, dim, **options).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]
    d_out = torch.randn(1, tokens, heads, dim, **options)
    ways = attentions(lengths, device)
    table = f"{name}, {tokens} tokens in {len(lengths)} sequences of {len({*lengths})} lengths"
    wide = [x.detach().float().requires_grad_() for x in inputs]
    expected = train(ways[PACKED], wide, d_out.float())
    timed: dict[str, Call] = {}
    for way, attention in ways.items():
        call = partial(train, attention, inputs, d_out)
        error = record.attempt(f"{name}: {way}", partial(check, call, expected))
        if error is None:
            continue
        timed[way] = call
        record.row(table, way, error=error, **peak_mib(call, device, outputs_bytes(inputs, d_out)))
    times = interleaved(timed, device, tiny, seconds=5)
    for way, own in times.items():
        values: dict[str, Any] = summary(own)
        if VARLEN in times:
            values["over_varlen"] = own.ratio_to(times[VARLEN])
        record.row(table, way, **values)


def attentions(lengths: list[int], device: torch.device) -> dict[str, Attention]:
    """Each takes (1, heads, T, dim) and returns (1, T, heads, dim)."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
    mask = (sequence[:, None] == sequence[None, :]).tril()
    module = torch.nn.Module()
    bounds = {
        "sequence_lengths": tuple(lengths),
        "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip

    def registered(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if name not in ALL_ATTENTION_FUNCTIONS:
            raise NotImplementedError(f"no attention {name} is registered")
        return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, None, **bounds)[0]

    def raw(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Fewer heads of keys than of queries are handed over as they are."""
        from torch.nn.attention.varlen import varlen_attn

        takes = inspect.signature(varlen_attn).parameters
        causal: dict[str, Any] = {"is_causal": True}
        if "window_size" in takes:
            causal = {"window_size": (-1, 0)}
        if "enable_gqa" in takes and key.shape[1] < query.shape[1]:
            causal["enable_gqa"] = True
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        longest = max(lengths)
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **causal)[None]

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(query, k, v, mask).transpose(1, 2)

    return {
        PACKED: partial(registered, PACKED), VARLEN: partial(registered, VARLEN),
        RAW: raw, DENSE: dense,
    }  # fmt: skip


def train(attention: Attention, inputs: list[Tensor], d_out: Tensor) -> tuple[Tensor, ...]:
    out = attention(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, d_out)


def outputs_bytes(inputs: list[Tensor], d_out: Tensor) -> int:
    return d_out.nbytes + sum(x.nbytes for x in inputs)


def check(call: Callable[[], tuple[Tensor, ...]], expected: tuple[Tensor, ...]) -> float:
    """The largest relative error of output and gradients."""
    pairs = zip(call(), expected, strict=True)
    error = max(float((found.float() - right).norm() / right.norm()) for found, right in pairs)
    if not error <= TOLERANCE:
        raise AssertionError(f"wrong: relative error {error:.1e}")
    return error
