"""Attacks that bring back what was only hidden: relearning a part, and rounding the weights."""
