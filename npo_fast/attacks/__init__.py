"""Attacks that recover knowledge which was hidden, not removed: relearning and quantization."""
