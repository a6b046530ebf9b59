"""How long TOFU's questions and answers are, for sequences of random tokens of the same lengths."""

# (prompt, answer) tokens of every sixth record of forget10 in the plain template, by the tokenizer
# of SmolLM2; the mean is 60, and the 400 records lie between 24 and 137
LENGTHS = (
    (39, 15), (28, 37), (19, 37), (23, 49), (22, 26), (20, 40), (21, 35), (18, 16),
    (21, 27), (24, 59), (18, 23), (21, 23), (23, 36), (19, 43), (27, 35), (24, 59),
    (28, 62), (26, 57), (23, 47), (25, 40), (36, 33), (28, 26), (25, 30), (24, 53),
    (19, 23), (26, 32), (22, 34), (21, 29), (24, 32), (21, 35), (34, 14), (18, 34),
    (19, 35), (20, 38), (17, 24), (19, 23), (24, 30), (22, 32), (25, 30), (18, 27),
    (32, 28), (23, 45), (23, 28), (19, 29), (18, 49), (30, 42), (16, 31), (20, 36),
    (20, 44), (18, 39), (33, 34), (22, 39), (33, 55), (22, 44), (23, 26), (27, 46),
    (23, 34), (18, 21), (19, 50), (22, 55), (32, 41), (27, 28), (38, 45), (37, 51),
)  # fmt: skip


def pack_lengths(tokens: int) -> list[int]:
    """Lengths of whole sequences in a pack of so many tokens, sorted as a pack has them."""
    lengths: list[int] = []
    while sum(lengths) < tokens:
        prompt, answer = LENGTHS[len(lengths) % len(LENGTHS)]
        lengths.append(min(prompt + answer, tokens - sum(lengths)))
    return sorted(lengths)
