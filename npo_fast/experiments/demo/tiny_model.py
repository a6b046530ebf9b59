"""A small Llama and its tokenizer, made on the spot."""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from npo_fast.model.causal_lm import CausalLM

END, PAD = "<|end|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the small world is a token or two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1280,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def new_model(tokenizer: Any, seed: int, positions: int = 128) -> CausalLM:
    """Two layers of width 128: 0.7 million parameters, most of them in the feed-forward layers.

    Args:
        positions: tokens of its context.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CausalLM(LlamaForCausalLM(config), probe=False)


def weights(lm: CausalLM) -> dict[str, torch.Tensor]:
    """A copy of the weights as they are now."""
    return {name: value.clone() for name, value in lm.model.state_dict().items()}
