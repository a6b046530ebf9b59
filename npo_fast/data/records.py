"""A record: the messages before an answer, and the answer; or a text by itself."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from npo_fast.errors import UserError, short

ROLES = {  # as data sets write them -> as chat templates know them
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
}
_CURES = {  # of keys whose content no record has room for
    **dict.fromkeys(
        ("tools", "tool_calls", "tool_call_id", "functions", "function_call"),
        "tools are not read: write the call into the text as the model writes it, or leave it out",
    ),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking", "thoughts"),
        "thoughts are not read: write them into the text with the model's own tags, or leave them "
        "out",
    ),
    **dict.fromkeys(
        ("image", "images", "image_url", "audio", "audios", "video", "videos"),
        "only text is read: leave these records out",
    ),
    **dict.fromkeys(
        ("weight", "weights", "train", "loss", "loss_weight", "loss_mask"),
        "weights are not read: --loss-on last or all says which answers carry the loss; remove "
        "the key",
    ),
    "chat_template_kwargs": "the template is the same for all records: give its arguments with "
    "--template-kwargs KEY=VALUE, and remove the key",
    **dict.fromkeys(
        ("chosen", "rejected"),
        'pairs are not read: write the one as "answer" and the other as "alternate"',
    ),
    "label": "preferences are not read: leave out unwanted answers, and remove the key",
    **dict.fromkeys(
        ("context", "history", "documents"), "it is not read: write it into the question"
    ),
}
_FALSE_SAYS = ("weight", "weights", "train", "loss", "loss_weight", "loss_mask", "label")


@dataclass(frozen=True)
class Record:
    """A question with its answer, to learn, keep or forget, and what its evaluation needs.

    A text by itself is an answer to no message. Messages may be given as pairs or as dicts with
    "role" and "content", which become pairs.

    Raises:
        UserError: messages or answers of another kind, an unknown role, tool calls, images.
    """

    messages: tuple[tuple[str, str], ...]  # (role, content) up to the answer; the last is a user's
    answer: str
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    alternates: tuple[str, ...] = ()
    paraphrased_question: str | None = None  # in the place of the last message

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", as_messages(self.messages, "messages of a Record"))
        for name in ("answer", "paraphrased_answer", "paraphrased_question"):
            value = getattr(self, name)
            if not (isinstance(value, str) or (value is None and name != "answer")):
                raise UserError(f"{name} of a Record must be a text, got {short(value)}")
        for name in ("perturbed_answers", "alternates"):
            texts = as_list(getattr(self, name))
            if texts is None or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{name} of a Record must be a list of texts, got {short(texts)}")
            object.__setattr__(self, name, tuple(texts))

    @property
    def is_text(self) -> bool:
        """Whether the record is a text by itself, which answers no question."""
        return not self.messages

    @property
    def question(self) -> str:
        """The last message before the answer; of a text ""."""
        return self.messages[-1][1] if self.messages else ""

    @property
    def rephrased(self) -> "Record | None":
        """The record that asks the paraphrased question instead; None without one."""
        if self.paraphrased_question is None or self.is_text:
            return None
        *earlier, (role, _) = self.messages
        messages = (*earlier, (role, self.paraphrased_question))
        return replace(self, messages=messages, paraphrased_question=None)


Records = str | Path | Iterable[Record | Mapping[str, Any]]  # by name, or in memory


def as_messages(messages: Any, where: str) -> tuple[tuple[str, str], ...]:
    """Messages as pairs of role and content, the role as chat templates know it.

    Args:
        messages: pairs, or dicts with "role" and "content", or ShareGPT's "from" and "value".
            Content may be a list of parts, of which each must be a text; they are joined.
        where: what messages of errors begin with.

    Raises:
        UserError: anything else, an unknown role, or what would be dropped, such as tool calls.
    """
    listed = as_list(messages)
    if listed is None:
        raise UserError(
            f'{where}: expected a list of {{"role", "content"}} messages, got {short(messages)}'
        )
    return tuple(_message(each, f"{where}, message {i + 1}") for i, each in enumerate(listed))


def check_unread(row: Mapping[Any, Any], where: str) -> None:
    """Raises ``UserError`` for a key with content that no record has room for."""
    for key, value in row.items():
        cure = _CURES.get(key) if isinstance(key, str) else None
        if cure is None or (is_empty(value) and not (value is False and key in _FALSE_SAYS)):
            continue
        if key == "label" and not isinstance(value, bool):
            continue  # such as a topic
        if isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"):
            continue
        raise UserError(f'{where}: "{key}" is {short(value)}, and {cure}')


def check_text(value: Any, what: str) -> str:
    """The text itself.

    Raises:
        UserError: no text, or one that UTF-8 cannot hold; the message begins with ``what``.
    """
    if not isinstance(value, str):
        raise UserError(f"{what} must be a text, got {short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds half a character (a lone surrogate): {error}") from error
    return value


def is_empty(value: Any) -> bool:
    """Whether there is nothing in it: exports write "", [], false or NaN where there is none."""
    if value is None or value is False:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return not value if isinstance(value, Mapping) else as_list(value) == []


def as_list(value: Any) -> list[Any] | None:
    """A list, tuple or array as a list; None for anything else."""
    if isinstance(value, (list, tuple)):
        return list(value)
    listed = value.tolist() if hasattr(value, "tolist") else None  # parquet read by pandas
    return listed if isinstance(listed, list) else None


def _message(message: Any, where: str) -> tuple[str, str]:
    if isinstance(message, Mapping):
        check_unread(message, where)
        role, content = (
            next((message[key] for key in keys if message.get(key) is not None), None)
            for keys in (("role", "from"), ("content", "value"))
        )
        if role is None:
            raise UserError(
                f'{where}: expected the keys "role" and "content", found '
                f"{sorted(map(str, message))}"
            )
    elif isinstance(message, (list, tuple)) and len(message) == 2:
        role, content = message
    else:
        raise UserError(f'{where}: expected {{"role", "content"}}, got {short(message)}')
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(
            f"{where}: unknown role {short(role)}: system, user and assistant are read (from "
            "ShareGPT human and gpt); leave out records with others, such as tools"
        )
    return ROLES[role], _content(content, f'{where}: "content"')


def _content(content: Any, what: str) -> str:
    parts = as_list(content)
    if parts is None:
        return check_text(content, what)
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise UserError(
                f'{what} has the part {short(part)}: only {{"type": "text", "text": …}} is read'
            )
        check_unread(part, what)
        texts.append(check_text(part.get("text"), what))
    return "".join(texts)
