"""Errors whose message is for the user: the command line prints them without a traceback.

A message is written with flags, such as ``--max-length``. A caller from Python reads keywords in
their place, ``max_length``; only within ``settings_as_flags`` are they shown as flags.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_FLAG = re.compile(r"`[^`]*`|(?<![^\s(])--([a-z][a-z0-9-]*)")  # commands in backticks stay
_as_flags = ContextVar("as_flags", default=False)


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


def first_line(error: BaseException) -> str:
    """The reason that an error gives, without advice and traces below it."""
    return str(error).strip().partition("\n")[0]
