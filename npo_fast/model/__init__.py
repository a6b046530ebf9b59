"""Hugging Face causal language models as a decoder and a head that packed batches run through."""

from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.load import load_model, load_tokenizer
from npo_fast.model.save import save_folder

__all__ = ["CausalLM", "load_model", "load_tokenizer", "save_folder"]
