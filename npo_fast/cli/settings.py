"""A frozen dataclass becomes the options of a subcommand; a YAML file may set them first."""

import argparse
import dataclasses
import difflib
import sys
import typing
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from npo_fast.data.rendering import as_pairs
from npo_fast.errors import UserError
from npo_fast.tables import printable

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Common:
    """What every subcommand takes."""

    json: bool = False
    """Print the result as one JSON object on standard output; NaN and infinity are null."""
    config: Path | None = None
    """YAML file with settings by flag name; flags override it."""


def parse(command: type[T], arguments: list[str], name: str, description: str) -> tuple[T, Common]:
    """The settings of a subcommand: defaults, then ``--config``, then flags.

    Raises:
        UserError: the YAML file cannot be read, or names no setting of this subcommand.
    """
    whole = dataclasses.make_dataclass(
        name,
        [("common", Common, dataclasses.field(default_factory=Common))],
        bases=(command,),
        frozen=True,
    )
    path = _config_path(arguments)
    from_file = [] if path is None else _arguments_of(path, _settings(whole))
    try:
        parsed: Any = tyro.cli(
            whole,
            prog=f"npo-fast {name}",
            description=description,
            args=[*from_file, *arguments],
            config=(
                tyro.conf.OmitArgPrefixes,
                tyro.conf.HelptextFromCommentsOff,
                tyro.conf.FlagCreatePairsOff,  # --overwrite, but no --no-overwrite
            ),
        )
    except SystemExit as end:
        if from_file and end.code:
            print(printable(f"npo-fast: {path} says {' '.join(from_file)}"), file=sys.stderr)
        raise
    return parsed, parsed.common


def _config_path(arguments: list[str]) -> Path | None:
    parser = argparse.ArgumentParser("npo-fast", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    return parser.parse_known_args(arguments)[0].config


def _arguments_of(path: Path, known: dict[str, tuple[Any, Any]]) -> list[str]:
    """The settings of a YAML file as arguments, in the order of the file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise UserError(f"no settings file {str(path)!r}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read settings from {str(path)!r}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold settings by name, got {type(values).__name__}")
    arguments: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{path}: unknown setting {name!r}{hint} Known: {', '.join(known)}")
        kind, default = known[name]
        kinds, flag = typing.get_args(kind) or (kind,), f"--{name.replace('_', '-')}"
        missing = value is None and type(None) not in kinds
        if missing or isinstance(value, bool) != (kind is bool):
            expected = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
            raise UserError(f"{path}: {name} is {value!r}, expected {expected}")
        if isinstance(value, bool):
            if value != default:
                arguments.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict) and typing.get_origin(kind) is dict:
            arguments += [flag, *as_pairs(value)]
        elif isinstance(value, list) and typing.get_origin(kind) is dict:
            arguments += [flag, *map(str, value)]
        elif value is not None:
            whole = isinstance(value, float) and value.is_integer() and float not in kinds
            arguments.append(f"{flag}={int(value) if whole else value}")
    return arguments


def _settings(command: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default of every setting in a dataclass and in the dataclasses within, by name.

    Positional arguments are not among them.
    """
    settings: dict[str, tuple[Any, Any]] = {}
    annotations = typing.get_type_hints(command, include_extras=True)
    hints = typing.get_type_hints(command)
    for field in dataclasses.fields(command):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            group = field.default_factory() if callable(field.default_factory) else None
            settings |= {
                name: (kind, getattr(group, name, default))
                for name, (kind, default) in _settings(hint).items()
            }
        elif tyro.conf.Positional not in getattr(annotations[field.name], "__metadata__", ()):
            settings[field.name] = hint, field.default
    return settings
