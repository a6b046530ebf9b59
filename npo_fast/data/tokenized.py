"""Records as tokens, and whether a model can read them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from npo_fast.errors import UserError


@dataclass(frozen=True)
class TokenizedExample:
    """Tokens of a prompt and its answer; only the answer carries a loss."""

    input_ids: tuple[int, ...]
    prompt_length: int  # tokens before the first answer token, at least 1
    index: int  # of the example in its split

    @property
    def answer_length(self) -> int:
        """Tokens of the answer."""
        return len(self.input_ids) - self.prompt_length


Sources = Mapping[str, list[TokenizedExample]]  # tokenised data by name: "forget", "retain", …


def check_readable(sources: Sources, vocabulary: int, positions: int | None = None) -> None:
    """Raises ``UserError`` for what the model cannot read.

    Args:
        vocabulary: of its token ids.
        positions: tokens of the longest sequence; None where any length goes.
    """
    for source, sequences in sources.items():
        for sequence in sequences:
            if positions is not None and len(sequence.input_ids) > positions:
                raise UserError(
                    f"{source} record {sequence.index + 1} has {len(sequence.input_ids)} tokens, "
                    f"and the model has {positions} positions: add --max-length {positions}"
                )
            if (largest := max(sequence.input_ids)) >= vocabulary:
                raise UserError(
                    f"{source} record {sequence.index + 1} has the token id {largest}, outside the "
                    f"model's vocabulary of {vocabulary}: model and tokenizer do not belong "
                    "together"
                )


def data_fingerprint(sequences: list[TokenizedExample]) -> str:
    """SHA-256 over the token ids and where each answer begins."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(f"{sequence.prompt_length}:{sequence.input_ids}".encode())
    return digest.hexdigest()
