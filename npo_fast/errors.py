"""Errors whose message is for the user: the command line prints them without a traceback.

A message is written with flags, such as ``--max-length``. A caller from Python reads keywords in
their place, ``max_length``; only within ``settings_as_flags`` are they shown as flags. It is one
line, whatever values and libraries put into it: control characters are escaped, and what is too
long is cut.

Whatever comes from outside is read inside of ``reading``, which makes a ``UserError`` of all that
its content makes Python or a library raise. ``npo_fast.boundary`` reads files.
"""

import json
import re
import reprlib
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_FLAG = re.compile(r"`[^`]*`|(?<![^\s(])--([a-z][a-z0-9-]*)")  # commands in backticks stay
_as_flags = ContextVar("as_flags", default=False)
_LONGEST = 2000  # characters of a message


@contextmanager
def settings_as_flags() -> Iterator[None]:
    """Inside, messages name settings as flags: for callers who typed a command."""
    token = _as_flags.set(True)
    try:
        yield
    finally:
        _as_flags.reset(token)


def in_words_of_caller(message: str) -> str:
    """The message with keywords in the place of flags, unless the caller typed a command."""
    if _as_flags.get():
        return message
    return _FLAG.sub(lambda m: m[1].replace("-", "_") if m[1] else m[0], message)


class _NamesSettings(Exception):  # noqa: N818 - a base class that nobody raises
    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))

    def __str__(self) -> str:
        return in_words_of_caller(super().__str__())


class UserError(_NamesSettings, ValueError):
    """Raised where the input is wrong; the message names the value and the cure."""


class NoSuchSplitError(UserError):
    """Raised where data that was named does not exist; optional data may be left out then."""


class CannotSaveError(UserError):
    """Raised where files cannot be written; what was there before is untouched."""


class NonFiniteError(UserError):
    """Raised where a loss or gradient is NaN or infinite, before the weights changed."""


class PartialUpdateError(NonFiniteError):
    """Raised after some parameters were updated; the weights are inconsistent."""


class OutOfMemory(UserError):  # noqa: N818 - Python's and PyTorch's names are taken
    """Raised where memory runs out whatever the micro-batches; the weights did not change."""


class SharedOutOfMemory(OutOfMemory):
    """Raised where one of several processes has no memory for a step.

    Args:
        micro_batch_tokens: of the smaller micro-batches with which all can begin it again.
        meets: whether these processes can meet again for that; else all have to be started anew.
    """

    def __init__(self, message: str, micro_batch_tokens: int, meets: bool = True) -> None:
        super().__init__(message)
        self.micro_batch_tokens, self.meets = micro_batch_tokens, meets


class PartialUpdateOutOfMemory(OutOfMemory):
    """Raised where memory ran out while weights were updated; they may be inconsistent."""


class Interrupted(_NamesSettings):
    """Raised where a signal ended the run; its checkpoint is saved."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@contextmanager
def named(where: str) -> Iterator[None]:
    """Inside, the message of a ``UserError`` begins with ``where``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


@contextmanager
def reading(what: object, cure: str = "") -> Iterator[None]:
    """Inside, whatever the content of ``what`` makes Python or a library raise is a ``UserError``.

    For calls of parsers and libraries, and for no code of our own, whose mistakes it would hide.
    Errors that are for the user already pass as they are.

    Args:
        what: a path, or words for what is read.
        cure: what the user can do; the message ends with it.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of a library in Rust, no Exception
        if isinstance(error, (_NamesSettings, NameError)) or not (
            panic or isinstance(error, Exception)
        ):
            raise
        advice = f"; {cure}" if cure else ""
        raise UserError(f"cannot read {what}: {reason_of(error)}{advice}") from error


def reason_of(error: BaseException) -> str:
    """What an error says went wrong, in words for a user."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{short(error.args[0]) if error.args else 'a key'} is missing"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error}"
    if mark := getattr(error, "problem_mark", None):  # of YAML
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"  # type: ignore[attr-defined]
    text = first_line(error)
    if "set_int_max_str_digits" in text:
        return "it holds a number of thousands of digits"
    return text or type(error).__name__


def first_line(error: BaseException) -> str:
    """The reason that an error gives, without advice and traces below it."""
    return str(error).strip().partition("\n")[0]


def one_line(text: str) -> str:
    """The text on one line, without control characters, and cut in its middle where it is long."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST * 3 // 4]} … {text[-_LONGEST // 4 :]}"
    if text.isprintable():
        return text
    line = " ".join(part for part in map(str.strip, text.splitlines()) if part)
    return "".join(ascii(c)[1:-1] if unicodedata.category(c)[0] == "C" else c for c in line)


def short(value: object) -> str:
    """``repr`` of a value, of at most some 80 characters, whatever it holds."""
    text = _repr.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Repr(reprlib.Repr):
    """``reprlib`` for values of any size: it reads no more than it shows."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else "an integer of many digits"


_repr = _Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 80, 80
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = 12
