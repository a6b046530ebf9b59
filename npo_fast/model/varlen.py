"""Causal attention within the sequences of a pack by PyTorch's own FlashAttention.

Registered with transformers as ``npo_fast_varlen``: ``torch.nn.attention.varlen.varlen_attn`` takes
a whole pack in one launch a layer and has a backward. It runs on NVIDIA GPUs in bf16 and fp16;
``npo_fast.model.choice`` knows which models it serves.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from npo_fast.model.attention import refuse_hidden_window

NAME = "npo_fast_varlen"
DTYPES = (torch.bfloat16, torch.float16)
WIDEST_HEAD, HEAD_MULTIPLE = 256, 8  # what PyTorch's FlashAttention checks


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, T, head_dim)
    key: Tensor,  # (1, key_value_heads, T, head_dim)
    value: Tensor,  # (1, key_value_heads, T, at most head_dim)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,  # (S + 1,) int32, where query is; None for one sequence
    max_length_q: int | None = None,  # tokens of the longest sequence
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (1, T, heads, value's head_dim)
    """``softmax(scaling * Q K^T + causal) V`` within each of the sequences.

    Raises ``NotImplementedError`` for what the kernel does not have, such as a softcap.
    """
    given = {"dropout": dropout or None, "softcap": softcap}
    given |= {name: kwargs.get(name) for name in ("s_aux", "position_bias")}
    for name, argument in given.items():
        if argument is not None:
            raise NotImplementedError(f"{NAME}: {name} is not supported")
    assert query.shape[0] == 1, tuple(query.shape)
    tokens, (head_dim, value_dim) = query.shape[2], (query.shape[3], value.shape[3])
    if not head_dim_fits(head_dim) or value_dim > head_dim:
        raise NotImplementedError(f"{NAME}: heads of {head_dim} and {value_dim} are not supported")
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        raise NotImplementedError(
            f"{NAME}: takes bf16 or fp16, not {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if cu_seq_lens_q is None or max_length_q is None:
        # made on the device: a copy from the host would wait for it
        cu_seq_lens_q = torch.arange(0, tokens + 1, tokens, dtype=torch.int32, device=query.device)
        max_length_q = tokens
    if sliding_window is None:
        refuse_hidden_window(module, max_length_q, NAME)
    varlen = varlen_function()
    assert varlen is not None, "choice.varlen_obstacle has checked it"
    # narrower values, as in multi-head latent attention, are padded with zeros and cropped again
    value = F.pad(value, (0, head_dim - value_dim)) if value_dim < head_dim else value
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attend(varlen, q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    out = out if value_dim == head_dim else out[..., :value_dim]  # a slice costs a copy backwards
    return out.unsqueeze(0), None


def attend(
    varlen: Callable[..., Any],  # varlen_attn of any PyTorch
    query: Tensor,  # (T, heads, head_dim)
    key: Tensor,  # (T, key_value_heads, head_dim)
    value: Tensor,  # (T, key_value_heads, head_dim)
    cu_seqlens: Tensor,  # (S + 1,) int32
    longest: int,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:  # (T, heads, head_dim)
    """Calls ``varlen`` by the parameters that it has; ``NotImplementedError`` for one it lacks.

    PyTorch 2.10 has ``is_causal`` alone, 2.11 ``scale`` and ``window_size``. Fewer heads of keys
    than of queries need nothing in 2.11, ``enable_gqa`` in a version that has it.
    """
    takes = parameters(varlen)
    arguments: dict[str, Any] = {}
    binding = window if window is not None and longest > window else None
    if "window_size" in takes:  # both ends count: W tokens are the token itself and W - 1 before
        arguments["window_size"] = (-1 if binding is None else binding - 1, 0)
    elif binding is None:
        arguments["is_causal"] = True
    else:
        raise NotImplementedError(f"{NAME}: this PyTorch has no window")
    if "scale" in takes:
        arguments["scale"] = scaling
    elif scaling is not None and not is_usual_scale(scaling, query.shape[-1]):
        raise NotImplementedError(f"{NAME}: this PyTorch has no scale")
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in takes:
        arguments["enable_gqa"] = True
    elif groups > 1 and "window_size" not in takes:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out: Tensor = varlen(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **arguments)
    return out


def head_dim_fits(head_dim: int) -> bool:
    """Whether PyTorch's FlashAttention has heads of this size."""
    return head_dim <= WIDEST_HEAD and head_dim % HEAD_MULTIPLE == 0


def is_usual_scale(scaling: float, head_dim: int) -> bool:
    """Whether ``scaling`` is ``head_dim**-0.5``, but for rounding in fp64."""
    return abs(scaling * head_dim**0.5 - 1) < 1e-12


def varlen_function() -> Callable[..., Any] | None:
    """``varlen_attn`` where PyTorch has it: 2.10 and newer."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@cache
def parameters(varlen: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters of this ``varlen_attn``, which differ between versions of PyTorch."""
    return frozenset(inspect.signature(varlen).parameters)


AttentionInterface.register(NAME, varlen_attention)
