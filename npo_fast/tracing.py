"""How ``torch.compile`` treats functions of this package.

``torch.compiler`` has decorators of the same meaning. They import the compiler where they decorate,
two seconds of every ``import npo_fast``; these leave that to whoever compiles.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def constant_result(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function whose result ``torch.compile`` takes as a constant when it traces."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def breaks_graph(
    unless: Callable[..., bool] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function that ``torch.compile`` cannot follow: it breaks the graph at the call.

    With ``unless``, a function of the same arguments, calls for which it is true are traced.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        outside: Any = torch._disable_dynamo(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            traced = unless is not None and unless(*args, **kwargs)
            if torch.compiler.is_compiling() and not traced:
                return outside(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    return decorate
