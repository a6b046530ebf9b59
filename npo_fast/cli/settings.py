"""One frozen dataclass a verb becomes its command line; a YAML file may fill it first."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from npo_fast.cli import Verb
from npo_fast.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Common:
    """What every verb takes."""

    json: bool = False
    """Print the result as one JSON object on standard output."""
    config: Path | None = None
    """YAML file with settings by flag name; flags override it."""


def parse(command: type[T], arguments: list[str], verb: str, about: Verb) -> T:
    """The settings of a verb from defaults, then ``--config``, then flags."""
    default = _from_yaml(command, _config_path(arguments))
    return tyro.cli(
        command,
        prog=f"npo-fast {verb}",
        description=f"{about.help}.\n\nExample: {about.example}",
        args=arguments,
        default=default,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.HelptextFromCommentsOff,
            tyro.conf.FlagCreatePairsOff,  # --overwrite, but no --no-overwrite
        ),
    )


def _config_path(arguments: list[str]) -> Path | None:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            return Path(arguments[i + 1])
        if argument.startswith("--config="):
            return Path(argument.partition("=")[2])
    return None


def _from_yaml(command: type[T], path: Path | None) -> T | Any:
    if path is None:
        return tyro.MISSING_NONPROP
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise UserError(f"no settings file {str(path)!r}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold settings by name, got {type(values).__name__}")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    known = _flat_fields(command)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{path}: unknown setting {key!r}{hint} Known: {', '.join(known)}")
    return _build(command, values, path)


def _fields(command: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(command)
    return [(field, hints[field.name]) for field in dataclasses.fields(command)]


def _flat_fields(command: type) -> list[str]:
    names: list[str] = []
    for field, hint in _fields(command):
        names += (
            _flat_fields(hint)
            if isinstance(hint, type) and dataclasses.is_dataclass(hint)
            else [field.name]
        )
    return names


def _build(command: type[T], values: Mapping[str, Any], path: Path) -> T:
    arguments = {}
    for field, hint in _fields(command):
        if dataclasses.is_dataclass(hint):
            arguments[field.name] = _build(hint, values, path)  # type: ignore[arg-type]
        elif field.name in values:
            arguments[field.name] = _checked(values[field.name], hint, field.name, path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            arguments[field.name] = tyro.MISSING
    return command(**arguments)


def _checked(value: Any, hint: Any, name: str, path: Path) -> Any:
    """YAML's value as the type that the flag has, so that ``lr: 1e-5`` (a text) is a number."""
    options = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else (hint,)
    for kind in options or (hint,):
        if typing.get_origin(kind) is typing.Literal:
            if value in typing.get_args(kind):
                return value
        elif kind is type(None):
            if value is None:
                return None
        elif isinstance(value, bool) or kind is bool:
            if isinstance(value, bool) and kind is bool:
                return value
        elif value is not None and kind in (int, float, str, Path):
            try:
                if kind is not int or float(value) == int(float(value)):
                    return kind(float(value)) if kind is int else kind(value)
            except (TypeError, ValueError):
                continue
    raise UserError(f"{path}: {name} is {value!r}, expected {_spell(hint)}")


def _spell(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")
