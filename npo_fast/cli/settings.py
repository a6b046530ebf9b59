"""A frozen dataclass becomes the options of a subcommand; a YAML file may set them first."""

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from npo_fast.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Common:
    """What every subcommand takes."""

    json: bool = False
    """Print the result as one JSON object on standard output."""
    config: Path | None = None
    """YAML file with settings by flag name; flags override it."""


def parse(command: type[T], arguments: list[str], name: str, description: str) -> tuple[T, Common]:
    """The settings of a subcommand: defaults, then ``--config``, then flags.

    Raises:
        UserError: the YAML file cannot be read, or names no setting of this subcommand.
    """
    whole = dataclasses.make_dataclass(
        command.__name__,
        [("common", Common, dataclasses.field(default_factory=Common))],
        bases=(command,),
        frozen=True,
    )
    path = _config_path(arguments)
    from_file = [] if path is None else _arguments_of(path, _flat_fields(command))
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
            print(f"npo-fast: {path} says {' '.join(from_file)}", file=sys.stderr)
        raise
    return parsed, parsed.common


def _config_path(arguments: list[str]) -> Path | None:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            return Path(arguments[i + 1])
        if argument.startswith("--config="):
            return Path(argument.partition("=")[2])
    return None


def _arguments_of(path: Path, known: list[str]) -> list[str]:
    """The settings of a YAML file as arguments, in the order of the file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise UserError(f"no settings file {str(path)!r}") from error
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
        if value is True:
            arguments.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:  # else the default
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


def _flat_fields(command: Any) -> list[str]:
    """Names of the settings in a dataclass and in the dataclasses within."""
    names: list[str] = []
    for field in dataclasses.fields(command):
        inner = field.default_factory if field.default_factory is not dataclasses.MISSING else None
        group = inner() if inner is not None else None
        if dataclasses.is_dataclass(group):
            names += _flat_fields(group)
        else:
            names.append(field.name)
    return names
