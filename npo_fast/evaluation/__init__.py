"""TOFU's evaluation: a model and records in, per-example logs in TOFU's own form out."""
