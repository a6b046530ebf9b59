"""Mistakes that a person can mend: the command line prints them without a traceback."""


class UserError(ValueError):
    """Something in the input is wrong; the message names the value and the cure."""


class NoSuchSplitError(UserError):
    """Data that was named is not there; where it was optional, one may go on without."""


class NonFiniteError(UserError):
    """A loss or gradient became NaN or infinite; training stopped before the weights changed."""


class PartialUpdateError(NonFiniteError):
    """As above, but some tensors had taken their step: the weights are of no step."""


class OutOfMemory(UserError):  # noqa: N818 - Python's and PyTorch's own names are taken
    """One sequence alone does not fit; training stopped before the weights changed."""


class PartialUpdateOutOfMemory(OutOfMemory):
    """Memory ran out while weights changed: they may be of no step."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A signal ended the run; what it takes to go on is saved."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
