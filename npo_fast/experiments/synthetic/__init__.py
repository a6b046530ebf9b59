"""The NPO paper's synthetic experiment and its theorem, in a model small enough for theory."""
