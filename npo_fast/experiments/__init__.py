"""Experiments that use the library: demo, the paper's synthetic one, ablations."""
