"""Checks of options that a person has typed, by the types that their dataclass declares."""

import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, Literal

from npo_fast.errors import UserError


def check_types(options: Any) -> None:
    """Checks each field of a dataclass against its annotation; a text becomes a ``Path``.

    Raises:
        UserError: a value of another type, or none of the choices.
    """
    kind: Any = type(options)
    for name, hint in _hints(kind).items():
        value = getattr(options, name)
        kinds = _kinds(hint)
        if isinstance(value, str) and Path in kinds and str not in kinds:
            object.__setattr__(options, name, Path(value))
        elif not any(_fits(value, k) for k in kinds):
            choices = [c for k in kinds if typing.get_origin(k) is Literal
                       for c in typing.get_args(k)]  # fmt: skip
            names = [repr(choice) for choice in choices] or [
                "None" if k is type(None) else k.__name__ for k in kinds
            ]
            raise UserError(f"{name} must be {' or '.join(names)}, got {value!r}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _kinds(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)
