"""Mistakes that a person can mend: the command line prints them without a traceback."""


class UserError(ValueError):
    """Something in the input is wrong; the message names the value and the cure."""


class NonFiniteError(UserError):
    """A loss or gradient became NaN or infinite; training stopped before the weights changed."""


class TornStepError(NonFiniteError):
    """As above, but some tensors had taken their step: the weights are of no step."""
