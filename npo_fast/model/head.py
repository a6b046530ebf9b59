"""The LM head of a Hugging Face model, for losses in other people's loops."""

import warnings
from typing import Any

from torch import nn

from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM


def head_of(model: Any) -> dict[str, Any]:
    """The head of a Hugging Face causal LM as keyword arguments of the losses.

        head = head_of(model)
        log_probs = sequence_log_probs(hidden, labels=labels, **head)

    ``weight`` (V, D) and ``bias`` (V,) or None are the model's own parameters and follow its
    training; ``softcap`` and ``logit_scale`` are what it does to its logits. A few tokens go
    through the model, to check that its logits are what this head makes of the decoder's hidden
    states: call it once, before training.

    Args:
        model: of transformers or peft, within DDP or compiled too, or a ``CausalLM``.

    Raises:
        UserError: a head that the losses do not know, or one that is sharded over processes.
    """
    if isinstance(model, CausalLM):
        return model.head_arguments
    for wrapper in ("_orig_mod", "module"):  # torch.compile, DDP
        model = inner if isinstance(inner := getattr(model, wrapper, None), nn.Module) else model
    if not all(hasattr(model, name) for name in ("config", "get_output_embeddings", "get_decoder")):
        has_weight = " (of a layer pass weight=layer.weight)" if hasattr(model, "weight") else ""
        raise UserError(
            "head_of reads a causal language model of transformers, got "
            f"{type(model).__name__}{has_weight}"
        )
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is not None and (weight.dim() != 2 or hasattr(weight, "full_tensor")):
        raise UserError(
            f"the LM head of {type(model).__name__} is sharded over processes: gather it "
            "(full_tensor, summon_full_params, GatheredParameters), and pass weight by yourself"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how packs run, which the head does not depend on
        return CausalLM(model, attention=_own_attention(model)).head_arguments


def _own_attention(model: Any) -> str:
    """The attention that the model has, so that nothing about it changes."""
    return model.config._attn_implementation or "eager"
