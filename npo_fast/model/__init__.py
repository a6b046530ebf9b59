"""Hugging Face causal language models as a decoder and a head that packed batches run through."""
