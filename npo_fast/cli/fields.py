"""The options of a subcommand, read from its dataclass: names, types, defaults and help texts."""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from npo_fast.suggestions import flag_of

_METAVARS = {int: "N", float: "NUMBER", Path: "PATH"}


@dataclass(frozen=True)
class Option:
    """One field of a command, or of a group of options in it."""

    name: str
    kind: Any
    """Its type, without ``Annotated``."""
    default: Any
    group: str
    """The first line of the docstring of the dataclass that it is a field of."""
    help: str
    metavar: str
    positional: bool

    @property
    def flag(self) -> str:
        """What to type: "--batch-size", or "--no-generate" where it is on by default."""
        return flag_of(f"no_{self.name}" if self.default is True else self.name)

    @property
    def argument(self) -> str:
        """What stands for a positional argument: its choices, or its name."""
        return self.metavar if typing.get_origin(self.kind) is Literal else self.name.upper()

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have."""
        is_union = typing.get_origin(self.kind) in (typing.Union, types.UnionType)
        return typing.get_args(self.kind) if is_union else (self.kind,)


def options_of(command: type[Any]) -> list[Option]:
    """Every option of a command, in the order of its fields; those of groups stand in between."""
    return [option for option in _options(command, None) if option is not None]


def _options(owner: type[Any], defaults: Any) -> Iterator[Option]:
    from tyro.conf import Positional, Suppress  # not where npo_fast.cli.main is imported

    annotations = typing.get_type_hints(owner, include_extras=True)
    hints, texts = typing.get_type_hints(owner), _texts(owner)
    group = (owner.__doc__ or "").strip().partition("\n")[0].replace("``", "").rstrip(".")
    for field in dataclasses.fields(owner):
        hint, marks = hints[field.name], getattr(annotations[field.name], "__metadata__", ())
        if Suppress in marks:
            continue
        default = getattr(defaults, field.name, field.default)
        if default is dataclasses.MISSING and callable(field.default_factory):
            default = field.default_factory()
        if dataclasses.is_dataclass(hint):
            yield from _options(typing.cast(type[Any], hint), default)
            continue
        text, metavar = texts.get(field.name, ""), ""
        for mark in marks:  # Help, tyro.conf.arg, or a constructor
            text = getattr(mark, "help", None) or text
            metavar = getattr(mark, "metavar", None) or metavar
        option = Option(field.name, hint, default, group, text, metavar, Positional in marks)
        yield option if metavar else dataclasses.replace(option, metavar=_metavar(option))


def _metavar(option: Option) -> str:
    """What stands for the value: its choices, or its type in a word; "" for a switch."""
    words = []
    for kind in option.kinds:
        if typing.get_origin(kind) is Literal:
            words += [str(choice) for choice in typing.get_args(kind)]
        elif kind not in (bool, type(None)):
            words.append(_METAVARS.get(kind, "NAME"))
    return "|".join(words)


def _texts(owner: type[Any]) -> dict[str, str]:
    """The text below each field, of a dataclass and those that it extends."""
    texts: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # built in, or made by make_dataclass
            continue
        body = ast.parse(textwrap.dedent(source)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    texts[name] = " ".join(text.split())
    return texts
