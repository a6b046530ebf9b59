"""Functions that ``torch.compile`` runs between two graphs."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def breaks_graph(
    unless: Callable[..., bool] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function that ``torch.compile`` cannot follow: it breaks the graph at the call.

    With ``unless``, a function of the same arguments, calls for which it is true are traced.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        outside: Any = torch.compiler.disable(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            traced = unless is not None and unless(*args, **kwargs)
            if torch.compiler.is_compiling() and not traced:
                return outside(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    return decorate
