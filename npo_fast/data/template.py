"""How a record becomes tokens: the chat template of the tokenizer, or plain tags."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from npo_fast.data.records import Record
from npo_fast.errors import UserError

TemplateName = Literal["auto", "chat", "plain"]


@dataclass(frozen=True)
class TokenizedExample:
    """Tokens of a prompt and its answer; only the answer carries a loss."""

    input_ids: tuple[int, ...]
    prompt_length: int  # tokens before the first answer token, at least 1
    index: int  # row of the record in its split

    @property
    def answer_length(self) -> int:
        """Tokens of the answer."""
        return len(self.input_ids) - self.prompt_length


Sources = Mapping[str, list[TokenizedExample]]  # tokenised data by name: "forget", "retain", …


class Template:
    """Turns records into token ids.

    "plain" writes ``Question: …\\nAnswer: …`` (several turns: one such pair a turn), "chat" uses
    the tokenizer's chat template, "auto" takes "chat" where the tokenizer has one. Prompt and
    answer are tokenised apart, so that training sees exactly the prompt that generation gets.

    Args:
        tokenizer: of transformers, with an end-of-sequence token.
        name: "auto", "chat" or "plain".
        max_length: tokens of prompt and answer together; longer answers are cut.

    Raises:
        UserError: an unknown template, or "chat" without a chat template.
    """

    def __init__(self, tokenizer: Any, name: TemplateName = "auto", max_length: int = 512) -> None:
        if name == "auto":
            name = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
        if name not in ("chat", "plain"):
            raise UserError(f"unknown template {name!r}: use auto, chat or plain")
        if name == "chat" and not getattr(tokenizer, "chat_template", None):
            raise UserError("this tokenizer has no chat template: use --template plain")
        if max_length < 2:
            raise UserError(f"max_length must be at least 2, got {max_length}")
        self.tokenizer = tokenizer
        self.name = name
        self.max_length = max_length

    def prompt_ids(self, record: Record) -> list[int]:
        """Tokens up to the answer: what generation starts from."""
        if self.name == "chat":
            return self._chat(record, None)
        text = ""
        for role, content in record.messages:
            text += {"user": f"Question: {content}\nAnswer:", "assistant": f" {content}\n"}.get(
                role, f"{content}\n"
            )
        return list(self.tokenizer(text)["input_ids"])

    def answer_ids(self, record: Record, answer: str) -> list[int]:
        """Tokens of the answer, closed by the end-of-sequence token."""
        if self.name == "chat":
            prompt, conversation = self._chat(record, None), self._chat(record, answer)
            if conversation[: len(prompt)] == prompt:
                return self._through_end(conversation[len(prompt) :])
            ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def encode(self, record: Record, index: int, answer: str | None = None) -> TokenizedExample:
        """Prompt and answer, cut to ``max_length``.

        Raises:
            UserError: a prompt without a token, or one that leaves no room for an answer.
        """
        prompt = self.prompt_ids(record)
        ids = prompt + self.answer_ids(record, record.answer if answer is None else answer)
        if len(prompt) >= self.max_length:
            raise UserError(
                f"record {index + 1}: its prompt alone has {len(prompt)} tokens, so no answer "
                f"token is left within max_length {self.max_length}; raise --max-length"
            )
        if not prompt:
            raise UserError(f"record {index + 1}: its prompt has no token")
        return TokenizedExample(tuple(ids[: self.max_length]), len(prompt), index)

    def encode_all(self, records: Iterable[Record]) -> tuple[list[TokenizedExample], int]:
        """All records, and how many of them were cut to ``max_length``."""
        sequences = []
        truncated = 0
        for index, record in enumerate(records):
            sequence = self.encode(record, index)
            sequences.append(sequence)
            if len(sequence.input_ids) == self.max_length:
                answer = self.answer_ids(record, record.answer)
                truncated += sequence.answer_length < len(answer)
        return sequences, truncated

    def _chat(self, record: Record, answer: str | None) -> list[int]:
        messages = [{"role": role, "content": content} for role, content in record.messages]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer is None
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _through_end(self, ids: list[int]) -> list[int]:
        """Drops what some chat templates write after the end of the turn, such as a newline."""
        end = self.tokenizer.eos_token_id
        if end in ids:
            return ids[: ids.index(end) + 1]
        return [*ids, end]


def check_vocabulary(sources: Sources, vocabulary: int) -> None:
    """Raises ``UserError`` for token ids outside of the model's vocabulary."""
    for source, sequences in sources.items():
        for sequence in sequences:
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
