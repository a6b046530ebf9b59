"""A world of made-up authors and a small language model: unlearning in minutes on a CPU."""
