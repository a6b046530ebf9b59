"""Control tokens: those that a template writes are tokens, and their texts in data are text."""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

from npo_fast.data.rendering import THINKING
from npo_fast.errors import UserError

# Private characters that data may not hold: stand-ins, and marks of rendering.py at the end
_FIRST, _LAST = 0xF8000, 0xFFFFD
_PRIVATE = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_STAND_INS = rf"([{chr(_FIRST)}-{chr(_LAST)}])\1*"
_WRITTEN_OUT = re.compile(r"\\U000f[8-9a-f][0-9a-f]{3}")  # as repr writes them


class Encoded(NamedTuple):
    """Token ids of a text."""

    ids: list[int]
    spans: list[tuple[int, int]] | None  # of each the characters; None where they are not told
    plain: list[int]  # ids without those that the tokenizer adds


class ControlTokens:
    """Encodes texts so that no control token, such as ``<|im_end|>``, comes from data.

    ``hide`` puts a stand-in of the same length in the place of such a text in data. The template
    then renders, and what it writes itself is found by its text. Where data holds any, a twin of
    the tokenizer encodes: its control tokens are named by their stand-ins, so that the whole text
    is encoded at once, as ever, and texts from data are ordinary there.

    Control tokens are special tokens, ends of turns, and added tokens that a chat template writes
    around turns; tags of thoughts only where they are special, for answers may hold thoughts.

    Args:
        tokenizer: of transformers.
        stops: ids that end a turn.
        markup: all that the chat template writes by itself.
    """

    def __init__(self, tokenizer: Any, stops: Iterable[int], markup: str) -> None:
        self.tokenizer = tokenizer
        decoder = getattr(tokenizer, "added_tokens_decoder", {})
        named = {*getattr(tokenizer, "all_special_ids", ())}
        texts = {i: str(token) for i, token in decoder.items()}
        self.added = {*texts}
        self.special = named | {i for i, token in decoder.items() if token.special}
        around = {
            i
            for i, text in texts.items()
            if text in markup and not text.isalnum() and not THINKING.search(text)
        }
        texts |= {i: tokenizer.convert_ids_to_tokens(i) for i in named - self.added}
        control = self.special | self.added.intersection(stops) | around
        self._texts = {i: texts[i] for i in sorted(control) if texts[i].strip()}
        self.ids = {*self._texts}
        # an unknown character of the data is this token
        self._steering = self.ids - {getattr(tokenizer, "unk_token_id", None)}
        by_length = sorted({*self._texts.values()}, key=len, reverse=True)
        self._by_character = {chr(_FIRST + i): text for i, text in enumerate(by_length)}
        self._stand_in = {t: c * len(t) for c, t in self._by_character.items()}
        any_text = "|".join(map(re.escape, by_length)) or "(?!)"
        self._pattern = re.compile(any_text)
        self._either = re.compile(f"{_STAND_INS}|(?:{any_text})")

    def find(self, text: str) -> str | None:
        """The first text of a control token in a text; None where there is none."""
        match = self._pattern.search(text)
        return match and match[0]

    def edge(self, text: str) -> str | None:
        """The text of a control token with which a text begins or ends, blanks apart."""
        text = text.strip()
        begins = self._pattern.match(text)
        ends = next((each for each in self._stand_in if text.endswith(each)), None)
        return begins[0] if begins else ends

    def hide(self, text: str) -> str:
        """A text from data, with stand-ins in the place of control tokens.

        Raises:
            UserError: the text holds a character that is kept for them.
        """
        if match := _PRIVATE.search(text):
            raise UserError(
                f"it holds the private character U+{ord(match[0]):X}, which npo_fast puts in the "
                "place of control tokens: remove it"
            )
        return self._pattern.sub(lambda match: self._stand_in[match[0]], text)

    def show(self, text: str) -> str:
        """A text or message as data has it, with the texts of control tokens for stand-ins."""
        text = _WRITTEN_OUT.sub(lambda match: chr(int(match[0][2:], 16)), text)
        return re.sub(_STAND_INS, self._swapped, text)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the message of a ``UserError`` shows data as it is."""
        try:
            yield
        except UserError as error:
            raise UserError(self.show(str(error))) from error

    def encode(self, text: str, add_special_tokens: bool) -> Encoded:
        """Ids of a rendered text, in which data is hidden.

        Raises:
            UserError: the tokenizer makes a control token of data, or cannot write its text.
        """
        shown = self.show(text)
        written = Counter(self._pattern.findall(text))
        encoded = _encode(self.tokenizer, shown, add_special_tokens)
        surplus = self._surplus(encoded, written)
        if shown == text and surplus is None:
            return encoded
        if surplus is not None and self._twin is not None:
            swapped = self._either.sub(self._swapped, text)
            encoded = _encode(self._twin, swapped, add_special_tokens)
        self._check(encoded, written, shown)
        return encoded

    def _swapped(self, match: re.Match[str]) -> str:
        """The stand-in of a text, or the text of stand-ins."""
        if not match[1]:
            return self._stand_in[match[0]]
        text = self._by_character.get(match[1], match[1])
        times, rest = divmod(len(match[0]), len(text))
        if rest:
            raise UserError(f"the chat template cuts {text!r}, the text of a control token")
        return text * times

    def _surplus(self, encoded: Encoded, written: Mapping[str, int]) -> str | None:
        """A control token of which there are more than the template wrote."""
        counts = Counter(i for i in encoded.plain if i in self._steering)
        more = (i for i, count in counts.items() if count > written.get(self._texts[i], 0))
        surplus = next(more, None)
        return None if surplus is None else self._texts[surplus]

    def _check(self, encoded: Encoded, written: Mapping[str, int], shown: str) -> None:
        lost = self._surplus(encoded, written)
        decoded = _squeezed(self.tokenizer.decode(encoded.ids))
        held = self._pattern.findall(shown)
        for text, count in Counter(held).items():
            if decoded.count(_squeezed(text)) < count:
                lost = lost or text
        if lost is not None:
            raise UserError(
                f"it holds {lost!r}, the text of a control token, which this tokenizer cannot "
                "encode as text: remove it"
            )

    @cached_property
    def _twin(self) -> Any:
        """The tokenizer with control tokens named by their stand-ins; None where none is made."""
        if getattr(self.tokenizer, "is_fast", False):
            return _fast_twin(self.tokenizer, self._stand_in)
        if hasattr(self.tokenizer, "tokens_trie"):
            return _slow_twin(self.tokenizer, self._stand_in)
        return None


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> Encoded:
    def call(**options: bool) -> Any:
        return tokenizer(text, verbose=False, **options)

    if not getattr(tokenizer, "is_fast", False):
        plain = list(call(add_special_tokens=False)["input_ids"])
        whole = call(add_special_tokens=True)["input_ids"] if add_special_tokens else plain
        return Encoded(list(whole), None, plain)
    encoded = call(add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    ids, spans = list(encoded["input_ids"]), encoded["offset_mapping"]
    # a token that the tokenizer adds holds no character
    plain = [i for i, (begin, end) in zip(ids, spans, strict=True) if begin < end]
    return Encoded(ids, spans, plain)


def _fast_twin(tokenizer: Any, names: Mapping[str, str]) -> Any:
    """A copy of a tokenizer of the ``tokenizers`` library, with other names for the same ids."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    else:  # Unigram's pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:  # none may lead to a control token
        model["merges"] = [pair for pair in model["merges"] if not _named(pair, names)]
    twin = copy.copy(tokenizer)
    twin._tokenizer = Tokenizer.from_str(json.dumps(state))
    return twin


def _slow_twin(tokenizer: Any, names: Mapping[str, str]) -> Any:
    """A copy of a tokenizer written in Python, with other names for the same ids."""
    twin = copy.copy(tokenizer)
    kind = type(tokenizer)
    # a part of a text that is the whole text of a special token is no token either
    twin.__class__ = type(kind.__name__, (kind,), {"all_special_tokens": ()})
    twin.prepare_for_model = tokenizer.prepare_for_model  # BOS and EOS are added by their names
    twin.tokens_trie = type(tokenizer.tokens_trie)()
    twin._added_tokens_decoder = {
        i: type(token)(
            **{**token.__getstate__(), "content": names.get(token.content, token.content)}
        )
        for i, token in tokenizer._added_tokens_decoder.items()
    }
    twin._added_tokens_encoder = {str(t): i for i, t in twin._added_tokens_decoder.items()}
    for name in twin._added_tokens_encoder:
        twin.tokens_trie.add(name)
    return twin


def _named(pair: Any, names: Iterable[str]) -> bool:
    first, second = pair.split(" ") if isinstance(pair, str) else pair
    return first in names or second in names or first + second in names


def _squeezed(text: str) -> str:
    """Without white space, which decoders put and drop at their own discretion."""
    return "".join(text.split())
