"""Causal attention within the sequences of a pack, for machines without FlashAttention.

Registered with transformers as ``npo_fast_packed``. Each sequence attends to itself alone, so the
cost is that of the sequences and no mask over the whole pack exists; neighbours of one length go
through scaled dot-product attention as one block.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from npo_fast.errors import UserError, first_line

NAME = "npo_fast_packed"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, T, head_dim)
    key: Tensor,  # (1, key_value_heads, T, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sequence_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (1, T, heads, head_dim)
    """``softmax(softcap(scaling * Q K^T) + causal) V`` within each of ``sequence_lengths``.

    Without lengths it is a call from outside, as of ``model.generate``, which brings a mask where
    causal attention alone is not meant.
    """
    for unsupported in ("s_aux", "position_bias"):
        if kwargs.get(unsupported) is not None:
            raise NotImplementedError(f"{NAME}: {unsupported} is not supported")
    tokens = query.shape[2]
    if sequence_lengths is None and (attention_mask is not None or tokens != key.shape[2]):
        masked = _attention(query, key, value, attention_mask, False, scaling, dropout, softcap)
        return masked.transpose(1, 2), None
    if attention_mask is not None and attention_mask.requires_grad:
        raise NotImplementedError(f"{NAME}: a mask with a gradient is not supported")
    lengths = sequence_lengths if sequence_lengths is not None else (tokens,)
    assert query.shape[0] == 1, tuple(query.shape)
    assert sum(lengths) == tokens, (lengths, tokens)
    if sliding_window is None:
        refuse_hidden_window(module, max(lengths, default=0), NAME)
    blocks = [(len(tuple(run)), length) for length, run in groupby(lengths)]
    # split, not slices: the gradients are joined once instead of each padded to the whole pack
    sizes = [count * length for count, length in blocks]
    parts = zip(*(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True)
    out = []
    for block, part in zip(blocks, parts, strict=True):
        # (heads, count * length, dim) -> (count, heads, length, dim)
        q, k, v = (x.unflatten(1, block).transpose(0, 1) for x in part)
        out.append(_attend(q, k, v, scaling, dropout, softcap, sliding_window))
    return torch.cat(out).unsqueeze(0), None


def set_attention(model: Any, attention: str) -> bool:
    """Whether the model takes this attention; ``UserError`` where transformers refuses it."""
    if model.config._attn_implementation != attention:
        try:
            model.set_attn_implementation(attention)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"{class_name(model)} cannot take attention {attention}: {first_line(error)}"
            ) from error
    return model.config._attn_implementation == attention


def class_name(model: Any) -> str:
    """The class of the model, under an adapter too."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def refuse_hidden_window(module: torch.nn.Module, longest: int, attention: str) -> None:
    """Raises ``UserError`` for more tokens than a window that a layer keeps in the mask alone."""
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    kind = layer_types[index] if layer_types and index is not None else "sliding_attention"
    name = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    window = getattr(config, name.get(kind, ""), None)
    if not window or longest <= window:  # 0 where it is off
        return
    code = vars(sys.modules[type(module).__module__])
    masks = ("create_sliding_window_causal_mask", "create_chunked_causal_mask")
    if any(mask in code for mask in masks):  # else the configuration names a window in vain
        raise UserError(
            f"{type(module).__name__} looks back {window} tokens and does not tell {attention} "
            f"so, and a sequence has {longest}: name --attention sdpa or eager, or cut sequences "
            f"to --max-length {window}"
        )


def packed_mask(
    *, batch_size: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """The mask that transformers makes for ``packed_attention``: none of a pack."""
    # earlier releases of transformers 5 give the positions of queries, not their number
    queries = kwargs["q_length"] if "q_length" in kwargs else len(kwargs["cache_position"])
    if batch_size == 1 and attention_mask is None and queries == kv_length:
        return None
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(
        batch_size=batch_size, kv_length=kv_length, attention_mask=attention_mask, **kwargs
    )


@contextmanager
def without_masks() -> Iterator[None]:
    """Inside, transformers makes no masks for packs: it would read their positions on the host."""
    masks = AttentionMaskInterface._global_mapping  # where transformers itself looks
    mask = masks.pop(NAME, None)
    try:
        yield
    finally:
        if mask is not None:
            masks[NAME] = mask


def _attend(
    query: Tensor,  # (count, heads, length, dim)
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:  # (count * length, heads, dim)
    length = query.shape[2]
    mask = None
    if softcap is not None or (window is not None and length > window):
        position = torch.arange(length, device=query.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < (window or length))
    out = _attention(query, key, value, mask, mask is None, scaling, dropout, softcap)
    return out.transpose(1, 2).flatten(0, 1)


def _attention(
    query: Tensor,  # (batch, heads, queries, dim)
    key: Tensor,  # (batch, key_value_heads, keys, dim)
    value: Tensor,
    mask: Tensor | None,  # broadcasts to (batch, heads, queries, keys): bool, or added to scores
    is_causal: bool,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:  # (batch, heads, queries, dim)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=is_causal, scale=scaling
        )
    assert not is_causal, "SDPA has no softcap, and what replaces it takes a mask"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, packed_mask)
