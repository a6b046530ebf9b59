"""Errors whose message is for the user: the command line prints them without a traceback."""


class UserError(ValueError):
    """Raised where the input is wrong; the message names the value and the cure."""


class NoSuchSplitError(UserError):
    """Raised where data that was named does not exist; optional data may be left out then."""


class NonFiniteError(UserError):
    """Raised where a loss or gradient is NaN or infinite, before the weights changed."""


class PartialUpdateError(NonFiniteError):
    """Raised after some parameters were updated; the weights are inconsistent."""


class OutOfMemory(UserError):  # noqa: N818 - Python's and PyTorch's names are taken
    """Raised where memory runs out whatever the micro-batches; the weights did not change."""


class PartialUpdateOutOfMemory(OutOfMemory):
    """Raised where memory ran out while weights were updated; they may be inconsistent."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Raised where a signal ended the run; its checkpoint is saved."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def first_line(error: BaseException) -> str:
    """The reason that an error gives, without advice and traces below it."""
    return str(error).strip().partition("\n")[0]
