"""Checks of values that a person has typed, by the types that are declared for them."""

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from npo_fast.errors import UserError, short
from npo_fast.suggestions import as_setting, options_in, suggestion

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Bound:
    """The values that a number of an ``Annotated`` type may have, in words for the message."""

    words: str
    holds: Callable[[float], bool]  # False for NaN


@dataclass(frozen=True)
class Help:
    """The help text of an option, where the docstring describes the Python field alone."""

    help: str


NON_NEGATIVE = Bound("0 or more", lambda number: 0 <= number < math.inf)
PositiveInt = Annotated[int, Bound("at least 1", lambda number: number >= 1)]
NonNegativeInt = Annotated[int, NON_NEGATIVE]
PositiveFloat = Annotated[float, Bound("positive", lambda number: 0 < number < math.inf)]
NonNegativeFloat = Annotated[float, NON_NEGATIVE]


class Checked:
    """Base of option dataclasses whose fields are checked against their annotations when made.

    A text becomes a ``Path`` where the annotation asks for one, and a ``Path`` a text.

    Raises:
        UserError: a value of another type, none of the choices, or out of bounds.
    """

    def __post_init__(self) -> None:
        annotations = typing.get_type_hints(type(self), include_extras=True)
        for name, hint in typing.get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), _kinds(hint)
            if isinstance(value, str) and Path in kinds and str not in kinds:
                object.__setattr__(self, name, Path(value))
            elif isinstance(value, Path) and str in kinds and Path not in kinds:
                object.__setattr__(self, name, str(value))
            else:
                _check(name, value, kinds)
            if isinstance(value, int) and abs(value) >= 2**63:
                raise UserError(f"{name} must be below 2**63, got {short(value)}")
            for mark in getattr(annotations[name], "__metadata__", ()):
                if isinstance(mark, Bound) and value is not None and not mark.holds(value):
                    raise UserError(f"{name} must be {mark.words}, got {short(value)}")


_JSON = {  # classes of JSON values, in words
    dict: "an object", list: "a list", str: "a text", bool: "true or false",
    int: "a whole number", float: "a number", type(None): "null",
}  # fmt: skip


def check_shape(value: Any, hint: Any, name: str = "") -> None:
    """Checks a value as JSON or YAML has it against a type hint, down to its last part.

    Args:
        hint: a class, a union, ``list[…]``, ``dict[str, …]``, a ``TypedDict`` (other keys than its
            own may hold anything), or ``Any``. A whole number is also a float.
        name: of the value, as messages call its parts: ``settings.training.lr``.

    Raises:
        UserError: the value, or a part of it, is of another type; or a key is missing.
    """
    if hint is Any:
        return
    kinds = _kinds(hint)
    kind = next((kind for kind in kinds if _is_json(value, _class_of(kind))), None)
    if kind is None:
        words = " or ".join(_JSON[_class_of(kind)] for kind in kinds)
        raise UserError(f"{f'{name} is' if name else 'it is'} {short(value)}, not {words}")
    parts: list[tuple[str, Any, Any]] = []  # name, value, hint
    if typing.is_typeddict(kind):
        for key, each in typing.get_type_hints(kind).items():
            if key in value:
                parts.append((key, value[key], each))
            elif key in kind.__required_keys__:
                raise UserError(f"{f'{name} has' if name else 'it has'} no {key!r}")
    elif hints := typing.get_args(kind):
        items = value.items() if isinstance(value, dict) else enumerate(value, 1)
        parts = [(short(key).strip("'"), part, hints[-1]) for key, part in items]
    for key, part, each in parts:
        check_shape(part, each, f"{name}.{key}" if name else key)


def _class_of(kind: Any) -> Any:
    return dict if typing.is_typeddict(kind) else typing.get_origin(kind) or kind


def _is_json(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and abs(value) < 2**63
    return isinstance(value, kind)


def check_output(
    folder: Path, mark: str, content: str, overwrite: bool, alone: bool = False
) -> None:
    """Checks that ``folder`` can take new results, whose file ``mark`` tells them from others'.

    Args:
        content: the results in words, such as "a demo".
        alone: whether other files in the folder are refused.

    Raises:
        UserError: a file of that name, earlier results without ``overwrite``, or other files.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the output {folder} is a file; name a folder")
    if (folder / mark).exists() and not overwrite:
        raise UserError(f"{folder} holds {content}; name another --output or add --overwrite")
    if alone and folder.exists() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise UserError(f"{folder} is not empty and does not hold {content}; name another --output")


def with_checked_keywords(function: Function) -> Function:
    """Decorates a function whose keywords are checked where annotations name classes, choices."""
    parameters = inspect.signature(function).parameters
    kinds = {name: _kinds(parameter.annotation) for name, parameter in parameters.items()}
    plain = {name for name in kinds if all(map(_can_be_checked, kinds[name]))}

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        if unknown := sorted(keywords.keys() - kinds.keys()):
            each = (_unknown_keyword(function.__name__, name, kinds) for name in unknown)
            raise UserError("; ".join(each))
        for name in plain & keywords.keys():
            _check(name, keywords[name], kinds[name])
        return function(*args, **keywords)

    return typing.cast(Function, checked)


def _unknown_keyword(function: str, name: str, kinds: dict[str, tuple[Any, ...]]) -> str:
    """What to write in place of a keyword that the function has not: options have their groups."""
    groups = {
        field.name: f"{parameter}={group.__name__}({field.name}=...)"
        for parameter, classes in kinds.items()
        for group in classes
        if isinstance(group, type) and dataclasses.is_dataclass(group)
        for field in dataclasses.fields(group)
    }
    if name in groups and name not in kinds:
        return f"{function} has no {name}: write {groups[name]}"
    meant = suggestion(name, [*kinds, *groups])
    if meant is None or not meant.startswith("--"):
        return f"{function} has no {name}" + (f": {as_setting(meant)}" if meant else "")
    (option,) = options_in(meant)
    place = "" if option in kinds else f" Write {groups[option]}"
    return f"{function} has no {name}; did you mean {option}?{place}"


def _check(name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    if any(_fits(value, kind) for kind in kinds):
        return
    choices = [
        repr(c) for k in kinds if typing.get_origin(k) is Literal for c in typing.get_args(k)
    ]
    classes = [kind for kind in kinds if typing.get_origin(kind) is not Literal]
    if choices:
        classes = [kind for kind in classes if kind is not type(None)]
    names = [*choices, *("None" if kind is type(None) else kind.__name__ for kind in classes)]
    raise UserError(f"{name} must be {' or '.join(names)}, got {short(value)}")


def _kinds(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _can_be_checked(kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return True
    return isinstance(kind, type) and typing.get_origin(kind) is None and kind is not Any


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, typing.get_origin(kind) or kind)
