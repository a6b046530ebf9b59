"""Experiments on the paper's claims with a small model, each run over several seeds."""
