"""How a conversation becomes text: a chat template or plain tags, and where the answer stands."""

import difflib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from npo_fast.boundary import parse_json, read_text
from npo_fast.errors import UserError, first_line

logger = logging.getLogger(__name__)

Messages = Sequence[tuple[str, str]]  # (role, content)

NAMES = ("auto", "chat", "plain")
# In the place of a question, an answer and the next question: private characters, which
# control.py keeps out of data
_ASKED, _ANSWER, _NEXT = "\U000ffff0", "\U000ffff1\U000ffff1", "\U000ffff2"
THINKING = re.compile("think|thought|reason", re.I)  # in a tag
_OPEN_THINKING = re.compile(rf"(?:<(\w*(?:{THINKING.pattern})\w*)>|\[(THINK)\])(\s*)$", re.I)
_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", re.S)
# Dates of a template, by format, in the place of the function that asks the clock
_PINNED_DATES = (
    "{%- macro strftime_now(format) -%}{{ pinned_dates[format] if format in pinned_dates else "
    "raise_exception('strftime_now takes a format that is no literal') }}{%- endmacro -%}{{ '' }}"
)
_RESERVED = ("messages", "conversation", "tools", "documents", "chat_template", "tokenize",
             "add_generation_prompt", "continue_final_message", "return_tensors", "return_dict",
             "padding", "truncation", "max_length", "pinned_dates", "strftime_now")  # fmt: skip


@dataclass(frozen=True)
class Rendering:
    """What decides how messages become text; ``run.json`` keeps it.

    Args:
        template: "auto", "chat" or "plain"; "auto" is "chat" where there is a chat template.
        chat_template: Jinja text in the place of the tokenizer's own.
        system_prompt: first message of every record that has no system message of its own.
        template_kwargs: variables for the chat template, such as ``date_string``.
        now: the date that ``strftime_now`` gives; None is the clock's.
    """

    template: str = "auto"
    chat_template: str | None = None
    system_prompt: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    now: datetime | None = None

    def __post_init__(self) -> None:
        if self.template not in NAMES:
            raise UserError(
                f"unknown template {self.template!r}: use auto, chat, plain or a .jinja file"
            )
        if taken := sorted({*_RESERVED} & self.template_kwargs.keys()):
            raise UserError(f"--template-kwargs cannot set {taken[0]}: npo_fast sets it")

    def check_variables(self, source: str) -> None:
        """Raises ``UserError`` for a variable that the template ``source`` does not name."""
        for name in self.template_kwargs:
            if not re.search(rf"\b{re.escape(name)}\b", source):
                near = difflib.get_close_matches(name, re.findall(r"\w+", source), n=1, cutoff=0.8)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(
                    f"--template-kwargs sets {name!r}, which the template does not read{hint}"
                )

    def with_system_prompt(self, messages: Messages) -> Messages:
        """The messages, after the system prompt where they begin with none."""
        if self.system_prompt is None or messages[0][0] in ("system", "developer"):
            return messages
        return [("system", self.system_prompt), *messages]


def read_template(name: str) -> tuple[str, str | None]:
    """Template name and Jinja text of what ``--template`` names.

    Raises:
        UserError: neither a template's name nor a file that can be read.
    """
    if name in NAMES:
        return name, None
    path = Path(name)
    if path.suffix not in (".jinja", ".jinja2", ".j2", ".txt"):
        raise UserError(f"unknown template {name!r}: use auto, chat, plain or a .jinja file")
    return "chat", read_text(path)


def parse_template_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """Variables from ``KEY=VALUE`` texts; a value is JSON (``false``, ``3``) or else a text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--template-kwargs takes KEY=VALUE, got {pair!r}")
        try:
            values[key] = parse_json(text.lower() if text in ("True", "False") else text)
        except UserError:
            values[key] = text
    return values


def as_pairs(values: Mapping[str, Any]) -> list[str]:
    """The ``KEY=VALUE`` texts that ``parse_template_kwargs`` reads as ``values``."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; ``text[start:end]`` is the answer, and all before it the prompt."""

    text: str
    start: int
    end: int


class Renderer(Protocol):
    """Messages and an answer -> text. ``openings`` are texts with which another turn begins."""

    def render(self, messages: Messages, answer: str) -> Rendered:
        """The whole conversation."""

    def closing(self) -> str:
        """What stands after an answer, as text."""

    def openings(self) -> tuple[str, ...]:
        """How turns of user and assistant begin: a model that writes this runs on."""


class PlainTags(Renderer):
    r"""``Question: …\nAnswer: …``, one such pair a turn; other roles are a line of their own."""

    def __init__(self, rendering: Rendering) -> None:
        rendering.check_variables("")  # there are none

    def render(self, messages: Messages, answer: str) -> Rendered:
        tags = {"user": "Question: {}\nAnswer:", "assistant": " {}\n"}
        prompt = "".join(tags.get(role, "{}\n").format(content) for role, content in messages)
        return Rendered(f"{prompt} {answer}", len(prompt), len(prompt) + 1 + len(answer))

    def closing(self) -> str:
        return ""

    def openings(self) -> tuple[str, ...]:
        return "\nQuestion:", "\nAnswer:"


class ChatTemplate(Renderer):
    """A Jinja chat template, rendered by the tokenizer.

    The prompt is all that stands before the answer: an empty think block too, where the template
    writes one. Where the template asks with more than it writes before an answer, such as an open
    think block, the prompt is what it asks with, and the block is closed.

    Raises:
        UserError: the tokenizer has no template.
    """

    def __init__(self, tokenizer: Any, rendering: Rendering) -> None:
        self.tokenizer = tokenizer
        self.source = rendering.chat_template or chat_template_of(tokenizer)
        if self.source is None:
            raise UserError("this tokenizer has no chat template: use --template plain")
        rendering.check_variables(self.source)
        self._program, self._variables = self.source, dict(rendering.template_kwargs)
        self._told: set[str] = set()
        self._last: tuple[Messages, tuple[str, str, str]] | None = None  # answers share a frame
        if "strftime_now" in self.source:
            now = rendering.now or datetime.now()
            formats = {match[2] for match in _DATE.finditer(self.source)}
            self._variables["pinned_dates"] = {each: now.strftime(each) for each in formats}
            self._program = _PINNED_DATES + self.source

    def render(self, messages: Messages, answer: str) -> Rendered:
        prompt, before, after = self._frame(messages)
        text = self._apply([*messages, ("assistant", answer)])
        written = text[len(before) : len(text) - len(after)]
        framed = text.startswith(before) and text.endswith(after)
        if not framed or written.strip() != answer.strip():
            content = answer.strip()
            if text.endswith(content + after):  # such as an answer that holds its own thoughts
                end = len(text) - len(after)
                return Rendered(text, end - len(content), end)
            raise UserError(
                "the chat template does not write the answer as it is, so its tokens cannot be "
                f"told: the answer {answer!r} became {text!r}; use --template plain, or a "
                "template of your own (--template FILE.jinja)"
            )
        return Rendered(prompt + text[len(before) :], len(prompt), len(prompt) + len(written))

    def closing(self) -> str:
        return self._frame([("user", _ASKED)])[2]

    def openings(self) -> tuple[str, ...]:
        question = [("user", _ASKED)]
        _, before, after = self._frame(question)
        following = self._apply([*question, ("assistant", _ANSWER), ("user", _NEXT)])
        user = following.partition(_ANSWER)[2].partition(_NEXT)[0]
        assistant = before.partition(_ASKED)[2]
        if after.strip():  # a line's end alone is a part of what begins the next turn
            user, assistant = (text.removeprefix(after) for text in (user, assistant))
        return tuple(text.strip(" ").rstrip() for text in (user, assistant) if text.strip())

    def markup(self) -> str:
        """All that the template writes around messages of each role, by itself."""
        asked, answered = ("user", _ASKED), ("assistant", _ANSWER)
        texts = []
        for messages in ([asked], [("system", _NEXT), asked], [asked, answered, asked, answered]):
            with suppress(UserError):  # a template may take no system message, or one turn alone
                texts.append(self._apply(messages, messages[-1] is asked))
        return "\n".join(texts)

    def _frame(self, messages: Messages) -> tuple[str, str, str]:
        """The prompt, and what the template writes before an answer and after it."""
        if self._last is not None and self._last[0] == messages:
            return self._last[1]
        before, marked, after = self._apply([*messages, ("assistant", _ANSWER)]).partition(_ANSWER)
        if not marked:
            raise UserError("the chat template does not write what the assistant says")
        asked = self._apply(messages, add_generation_prompt=True)
        prompt = asked if asked.startswith(before) else before
        if not before.startswith(asked) and not asked.startswith(before):
            shared = next(i for i, (a, b) in enumerate(zip(asked, before, strict=False)) if a != b)
            if _missing(messages, before) and not _missing(messages, asked):
                prompt = asked
            self._tell(
                "divergence",
                f"the chat template asks with {asked[shared:]!r} where it writes "
                f"{before[shared:]!r} before an answer: prompts are what it "
                f"{'asks with' if prompt is asked else 'writes'}",
            )
        self._check_complete(messages, prompt, before)
        prompt = self._closed(prompt)
        self._last = messages, (prompt, before, after)
        return prompt, before, after

    def _closed(self, prompt: str) -> str:
        """The prompt, with a think block at its end closed: answers are no thoughts."""
        match = _OPEN_THINKING.search(prompt)
        if match is None:
            return prompt
        self._tell(
            "thinking", f"the chat template opens {match[0].strip()}: prompts close it, empty"
        )
        closing = f"</{match[1]}>" if match[1] else f"[/{match[2]}]"
        return f"{prompt}{'' if match[3] else chr(10)}\n{closing}\n\n"

    def _check_complete(self, messages: Messages, prompt: str, before: str) -> None:
        """Raises ``UserError`` for a message of system or user that changes nothing."""
        for i in _missing(messages, prompt):
            role, content = messages[i]
            other = [*messages[:i], (role, _NEXT), *messages[i + 1 :], ("assistant", _ANSWER)]
            if self._apply(other).partition(_ANSWER)[0] == before:
                raise UserError(
                    f"the chat template drops the {role} message {content!r}: leave it out, or "
                    "use another --template"
                )

    def _tell(self, what: str, warning: str) -> None:
        """Warns once of each thing, whatever the record."""
        if what not in self._told:
            self._told.add(what)
            logger.warning(warning)

    def _apply(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=self._program, tokenize=False,
                add_generation_prompt=add_generation_prompt, **self._variables,
            )  # fmt: skip
        except Exception as error:  # a template is a program, and may raise anything
            roles = ", ".join(role for role, _ in messages)
            raise UserError(
                f"the chat template fails on messages of {roles}: {first_line(error)}; mend the "
                "record, or use another --template"
            ) from error
        return str(text)


def _missing(messages: Messages, text: str) -> list[int]:
    """The messages of system and user that do not stand in the text as they are."""
    return [
        i
        for i, (role, content) in enumerate(messages)
        if role != "assistant" and content.strip() not in text
    ]


def chat_template_of(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template, the default one of several."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise UserError(f"the tokenizer's chat templates: {first_line(error)}") from error


def markup_of(tokenizer: Any, rendering: Rendering) -> str:
    """What the chat template writes by itself; "" without one, or without one that renders."""
    try:
        return ChatTemplate(tokenizer, rendering).markup()
    except UserError:
        return ""
