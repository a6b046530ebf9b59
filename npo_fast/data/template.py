"""How a record becomes tokens: rendered and tokenised once, the answer found by its characters."""

import hashlib
import logging
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

from npo_fast.data.control import ControlTokens
from npo_fast.data.records import Record
from npo_fast.data.rendering import (
    ChatTemplate,
    PlainTags,
    Renderer,
    Rendering,
    chat_template_of,
    markup_of,
)
from npo_fast.data.tokenized import TokenizedExample
from npo_fast.errors import UserError, named

logger = logging.getLogger(__name__)

Ending = Literal["stop", "ran on", "limit"]  # how a generated answer ended


class Template:
    r"""Turns records into token ids, and the tokens of a generated answer into text.

    The whole conversation is rendered and tokenised once. A token that holds a character of the
    answer belongs to the answer; the prompt is all before it, in training and in generation. The
    label goes through the first end-of-turn token after the answer: a special token of the chat
    template, else the tokenizer's end-of-sequence token.

    Text from data is text. Where it holds that of a control token, such as ``<|im_end|>``, it is
    encoded as the characters that it is; but an end of turn that an answer brings is the one that
    the template writes.

    Raw text is no conversation: its tokens are cut into windows of ``max_length`` that all carry
    loss. A window begins with the tokens that the tokenizer puts before a text (BOS), else with
    the last token of the window before.

    Args:
        tokenizer: of transformers, with an end-of-sequence token.
        name: "auto", "chat" or "plain" (``Question: …\nAnswer: …``); that of ``rendering`` where
            it is not given.
        max_length: tokens of prompt and answer together; longer answers are cut.
        rendering: system prompt, template variables, date.
        stop_ids: further tokens that end a turn, such as those of the model's generation config.

    Raises:
        UserError: an unknown template, or "chat" without a chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str | None = None,
        max_length: int = 512,
        *,
        rendering: Rendering = Rendering(),
        stop_ids: Iterable[int] = (),
    ) -> None:
        if not hasattr(tokenizer, "eos_token_id"):
            raise UserError(f"Template takes a tokenizer of transformers, got {tokenizer!r:.80}")
        name = Rendering(rendering.template if name is None else name).template
        if name == "auto":
            own = rendering.chat_template or chat_template_of(tokenizer)
            name = "chat" if own else "plain"
        if max_length < 2:
            raise UserError(f"max_length must be at least 2, got {max_length}")
        self.tokenizer, self.name, self.max_length = tokenizer, name, max_length
        self.rendering = rendering
        self.renderer: Renderer = (
            ChatTemplate(tokenizer, rendering) if name == "chat" else PlainTags(rendering)
        )
        self._given_stops = {tokenizer.eos_token_id, *stop_ids}
        self._ends_of: dict[str, set[int]] = {}
        self._told: set[str] = set()

    def description(self) -> dict[str, Any]:
        """The rendering as ``run.json`` has it, and as ``evaluate`` takes it over from a run."""
        rendering, source = self.rendering, getattr(self.renderer, "source", None)
        now = rendering.now if source is not None and "strftime_now" in source else None
        return {
            "template": self.name,
            "chat_template": rendering.chat_template,
            "chat_template_sha256": source and hashlib.sha256(source.encode()).hexdigest(),
            "system_prompt": rendering.system_prompt,
            "template_kwargs": dict(rendering.template_kwargs),
            "now": now and now.isoformat(),
        }

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(
            self.tokenizer, self._given_stops, markup_of(self.tokenizer, self.rendering)
        )

    @cached_property
    def _ends(self) -> set[int]:
        """What may end a turn."""
        begins = {getattr(self.tokenizer, f"{name}_token_id", None) for name in ("unk", "bos")}
        return self._control.special - begins | self._given_stops

    @cached_property
    def _own_end(self) -> re.Pattern[str]:
        """The end of an answer that brings its end of turn."""
        ids = (self._ends_in(self.renderer.closing()) | self._given_stops) & self._control.ids
        ends = self.tokenizer.convert_ids_to_tokens(sorted(ids))
        return re.compile(f"((?:{'|'.join(map(re.escape, ends))})\\s*)+$")

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's, the model's and the template's."""
        if self.name == "plain":
            return frozenset(self._given_stops)
        ids, _ = self.tokenize(Record((("user", "a"),), "b"))
        return frozenset({*self._given_stops, ids[-1]})

    @cached_property
    def _end(self) -> int:
        """The last token of a label where the template writes no token that ends a turn.

        Where nothing at all stands between an answer and the next turn, a token that begins that
        turn may be what the model stops with.
        """
        if self.name == "chat" and not self.renderer.closing():
            following = [self._ids(text, False) for text in self.renderer.openings()[:1]]
            if following and following[0][0] in self._given_stops:
                return following[0][0]
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def _openings(self) -> tuple[set[int], tuple[str, ...]]:
        """Control tokens, and texts without one, with which another turn begins."""
        marks: set[int] = set()
        texts = []
        ends = [*self.stop_ids, getattr(self.tokenizer, "bos_token_id", None)]
        ended = tuple(self.tokenizer.convert_ids_to_tokens([i for i in ends if i is not None]))
        for text in self.renderer.openings():
            while text.lstrip().startswith(ended):  # what ends a turn begins none
                text = text.lstrip()
                text = text.removeprefix(next(each for each in ended if text.startswith(each)))
            control = {*self._ids(text, False)} & self._control.ids
            marks |= control
            texts += [] if control or not text.strip() else [text.strip(" ")]
        return marks - self.stop_ids, tuple(texts)

    def encode(self, record: Record, index: int, answer: str | None = None) -> TokenizedExample:
        """Prompt and answer, cut to ``max_length``.

        Raises:
            UserError: the template fails on the record, its answer cannot be told from its prompt,
                or the prompt leaves no room for an answer.
        """
        with named(f"record {index + 1}"):
            ids, prompt_length = self._fitting(record, answer)
        return TokenizedExample(ids[: self.max_length], prompt_length, index)

    def encode_all(
        self, records: Iterable[Record], where: str = ""
    ) -> tuple[list[TokenizedExample], int]:
        """Examples of all records, and how many answers were cut to ``max_length``.

        A record is one example, in order; a raw text is as many as it has windows. Errors begin
        with ``where``, else with the number of the record.
        """
        examples: list[TokenizedExample] = []
        truncated = 0
        for number, record in enumerate(records, 1):
            with named(where or f"record {number}"):
                pieces = self.windows(record.answer) if record.is_text else [self._fitting(record)]
            for ids, prompt_length in pieces:
                cut = ids[: self.max_length]
                examples.append(TokenizedExample(cut, prompt_length, len(examples)))
                truncated += cut != ids
        return examples, truncated

    def windows(self, text: str) -> list[tuple[tuple[int, ...], int]]:
        """The windows of a raw text, each with how many tokens at its start carry no loss.

        Every token of the text is predicted once; where nothing stands before it, all but the
        first.

        Raises:
            UserError: there is nothing to predict.
        """
        if (match := self._control.edge(text)) is not None:
            raise UserError(
                f"the text begins or ends with {match!r}, a control token: it was rendered before. "
                "Give conversations as messages, which the template renders, or remove the tokens"
            )
        hidden = self._hidden(text)
        ids, plain = self._ids(hidden, True), self._ids(hidden, False)
        lead = _lead(ids, plain)
        given = max(lead, 1)
        size = self.max_length - given
        if size < 1 or len(ids) <= given:
            raise UserError(
                f"a text of {len(plain)} tokens leaves none to predict within max_length "
                f"{self.max_length}"
            )
        before, body = ids[:lead], ids[given:]
        return [
            (tuple((before or ids[i : i + 1]) + body[i : i + size]), given)
            for i in range(0, len(body), size)
        ]

    def answer_text(self, ids: list[int], max_new_tokens: int) -> tuple[str, Ending]:
        """The text of a generated answer, and how it ended.

        Args:
            ids: up to and without a token that stops.

        An answer ends where the model begins another turn, such as ``\\nQuestion:``; the rest is
        not the answer, and it "ran on". With ``max_new_tokens`` it was cut at the "limit".
        """
        marks, texts = self._openings
        ending: Ending = "limit" if len(ids) >= max_new_tokens else "stop"
        first = next((i for i, token in enumerate(ids) if token in marks), None)
        if first is not None:
            ids, ending = ids[:first], "ran on"
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        closing = self.renderer.closing().strip()
        if closing in text and closing and not self._control.find(closing):  # it is no token
            text, ending = text.partition(closing)[0], "stop"
        cuts = [at for opening in texts if (at := _turn_at(opening, text)) is not None]
        if cuts:
            text, ending = text[: min(cuts)], "ran on"
        return text.strip(), ending

    def tokenize(self, record: Record, answer: str | None = None) -> tuple[list[int], int]:
        """Tokens through the end of the turn, however many; and how many are the prompt's.

        Raises:
            UserError: as ``encode``, without the record's number.
        """
        if record.is_text:
            raise UserError("raw text asks nothing, so it has no other answer")
        messages = [
            (role, self._hidden(content, role == "assistant"))
            for role, content in self.rendering.with_system_prompt(record.messages)
        ]
        hidden = self._hidden(record.answer if answer is None else answer, True)
        with self._control.shown():
            rendered = self.renderer.render(messages, hidden)
            text, end = rendered.text, rendered.end
            ends_turn = self._ends_in(text[end:])
            if not ends_turn:  # what follows the answer ends no turn
                text = text[:end]
            ids, first, last = self._answer_tokens(text, rendered.start, end)
        if not ends_turn:
            return [*ids[:last], self._end], first
        stop = next((i for i in range(last, len(ids)) if ids[i] in ends_turn), last)
        return ids[: stop + 1], first

    def _hidden(self, text: str, is_answer: bool = False) -> str:
        """A text from data, with stand-ins for control tokens; an answer without its own end."""
        hidden = self._control.hide(text)
        if hidden == text:
            return text
        if is_answer and (end := self._own_end.search(text)) and text[: end.start()].strip():
            self._tell(
                f"answers end with {end[1].strip()!r}: it is the end that the template writes"
            )
            return self._hidden(text[: end.start()])
        self._tell(
            f"the data holds {self._control.find(text)!r}, the text of a control token: it is "
            "encoded as text, as all data; remove it where it is meant as the token"
        )
        return hidden

    def _tell(self, warning: str) -> None:
        """Warns once of each kind, whatever the record."""
        kind = warning.partition(" ")[0]
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(warning)

    def _ends_in(self, text: str) -> set[int]:
        """The tokens of what follows an answer that may end its turn."""
        if not text.strip():
            return set()
        if text not in self._ends_of:  # few: most answers of a template are followed by the same
            ids = self._ids(text, False)
            first = self._ids(text.lstrip(), False)[:1]  # an added token there is no other mark
            self._ends_of[text] = {*ids} & self._ends or {*first} & self._control.added
        return self._ends_of[text]

    def _fitting(self, record: Record, answer: str | None = None) -> tuple[tuple[int, ...], int]:
        """As ``tokenize``, where at least a token of the answer is within ``max_length``."""
        ids, prompt_length = self.tokenize(record, answer)
        if prompt_length >= self.max_length:
            raise UserError(
                f"its prompt alone has {prompt_length} tokens, so no answer token is left within "
                f"max_length {self.max_length}; raise --max-length"
            )
        return tuple(ids), prompt_length

    def _answer_tokens(self, text: str, start: int, end: int) -> tuple[list[int], int, int]:
        """Tokens of a text; those from the first to before the last hold ``text[start:end]``."""
        ids, spans, plain = self._control.encode(text, add_special_tokens=self.name == "plain")
        if spans is not None:
            inside = [
                i
                for i, (begin, stop) in enumerate(spans)
                if begin < end and stop > start
                # a control token may take the blanks beside it
                if ids[i] not in self._control.added
                or text[max(begin, start) : min(stop, end)].strip()
            ]
            first, last = (inside[0], inside[-1] + 1) if inside else (0, 0)
            shared = text[spans[first][0] : start] if inside else ""
        else:
            lead = _lead(ids, plain)
            first, last = (lead + self._prefix(text[:at], plain) for at in (start, end))
            shared = ""
        if not 0 < first < last or shared.strip():
            raise UserError(
                f"its answer {text[start:end]!r} cannot be told from its prompt"
                + (f", for {shared!r} before it is in the same token" if shared.strip() else "")
                + f": it is rendered as {text!r}"
            )
        return ids, first, last

    def _prefix(self, text: str, ids: list[int]) -> int:
        """How many of the tokens ``ids`` a text is that they begin with; -1 where it is none.

        For tokenizers that do not tell where a token stands. Blanks at its end may be in the next.
        """
        for part in (text, text.rstrip()):
            beginning = self._ids(part, False)
            if ids[: len(beginning)] == beginning:
                return len(beginning)
        return -len(ids) - 1

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._control.encode(text, add_special_tokens).ids


def _turn_at(opening: str, text: str) -> int | None:
    """Where the text begins another turn: on a line, or after a sentence."""
    for match in re.finditer(re.escape(opening), text):
        before = text[: match.start()].rstrip(" ")
        if opening.startswith("\n") or not before or before[-1] in "\n.!?\"'):;":
            return match.start()
    return None


def _lead(ids: list[int], plain: list[int]) -> int:
    """How many tokens the tokenizer puts before those of the text itself."""
    size = len(plain)
    return next((k for k in range(len(ids) - size + 1) if ids[k : k + size] == plain), 0)


def text_fingerprint(records: Iterable[Record]) -> str:
    """SHA-256 over messages and answers, whatever the template."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr((record.messages, record.answer)).encode())
    return digest.hexdigest()
