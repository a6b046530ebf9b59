"""The attention implementation of a transformers model: which it has, and what it needs to know."""

from typing import Any

from npo_fast.data import PackedBatch
from npo_fast.errors import UserError, first_line
from npo_fast.model.attention import NAME as PACKED
from npo_fast.model.varlen import NAME as VARLEN


def native_attention(model: Any) -> str:
    """The attention that transformers chose for the model.

    A configuration that another ``CausalLM`` shares may name one of ours instead.
    """
    chosen = model.config._attn_implementation or "eager"
    if chosen not in (PACKED, VARLEN):
        return chosen
    return "sdpa" if model._supports_sdpa else "eager"


def set_attention(model: Any, attention: str) -> bool:
    """Gives the model this attention; returns whether it took it.

    Raises:
        UserError: transformers refuses it for this model.
    """
    if model.config._attn_implementation != attention:
        try:
            model.set_attn_implementation(attention)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"{class_name(model)} cannot take attention {attention}: {first_line(error)}"
            ) from error
    return model.config._attn_implementation == attention


def boundary_arguments(attention: str, batch: PackedBatch, packs: bool) -> dict[str, Any]:
    """What tells ``attention`` where the sequences of a pack end, as arguments of the decoder.

    Args:
        packs: whether the model takes packs; else the batch is a single sequence.
    """
    arguments: dict[str, Any] = {}
    if packs:  # for attentions not named here, transformers makes the mask from the position ids
        arguments["position_ids"] = batch.position_ids[None]
    if packs and attention == PACKED:
        arguments["sequence_lengths"] = batch.lengths
    if "flash" in attention or (packs and attention == VARLEN):  # any version, or one of the hub
        longest = max(batch.lengths)
        arguments |= {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
        arguments |= {"max_length_q": longest, "max_length_k": longest}
    return arguments


def class_name(model: Any) -> str:
    """The class of the model, under an adapter too."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
