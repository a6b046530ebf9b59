"""The attention implementation of a transformers model: which it has, and what it needs to know."""

from typing import Any

from npo_fast.data import PackedBatch
from npo_fast.errors import UserError
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
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{class_name(model)} cannot take attention {attention}: {reason}"
            ) from error
    return model.config._attn_implementation == attention


def boundary_arguments(attention: str, batch: PackedBatch, packs: bool) -> dict[str, Any]:
    """What tells ``attention`` where the sequences of a pack end, as arguments of the decoder.

    Args:
        packs: whether the model takes packs; else the batch is a single sequence.
    """
    arguments: dict[str, Any] = {}
    if attention == PACKED:
        arguments = {"sequence_lengths": batch.lengths} if packs else {}
    elif attention == VARLEN:
        arguments = _cu_seqlens_arguments(batch) if packs else {}
    elif "flash" in attention:  # of any version, or a kernel of the hub
        arguments = _cu_seqlens_arguments(batch)
    # for other attentions transformers makes the mask of a pack from position ids that restart
    if packs:
        arguments["position_ids"] = batch.position_ids[None]
    return arguments


def _cu_seqlens_arguments(batch: PackedBatch) -> dict[str, Any]:
    longest = max(batch.lengths)
    return {
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def class_name(model: Any) -> str:
    """The class of the model, under an adapter too."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
