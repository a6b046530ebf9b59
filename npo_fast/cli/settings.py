"""A frozen dataclass becomes the options of a subcommand; a YAML file may set them first."""

import argparse
import dataclasses
import datetime
import difflib
import io
import re
import typing
from collections import Counter
from collections.abc import Iterable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from npo_fast.boundary import read_text
from npo_fast.data.rendering import as_pairs
from npo_fast.errors import UserError, reading, short

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
        UserError: an option that there is not, a value that it cannot have, or a YAML file that
            cannot be read.
    """
    whole = dataclasses.make_dataclass(
        name,
        [("common", Common, dataclasses.field(default_factory=Common))],
        bases=(command,),
        frozen=True,
    )
    path = _config_path(arguments)
    from_file = [] if path is None else _arguments_of(path, _settings(whole))
    said = io.StringIO()
    try:
        with redirect_stderr(said):
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
        if not end.code:
            raise
        source = f"; {path} says {' '.join(from_file)}" if from_file else ""
        text = re.sub(r"^Error parsing \w+: |\.$", "", _in_box(said.getvalue()))
        raise UserError(f"{text}{_nearest(text, _settings(whole))}{source}") from end
    return parsed, parsed.common


def _nearest(text: str, known: Iterable[str]) -> str:
    """The flag or the choice that may be meant where tyro names none itself."""
    wrong = re.match(r"invalid choice '(.*?)' for argument .* Expected one of \((.*)\)", text)
    if wrong is not None:
        near = difflib.get_close_matches(wrong[1], re.findall(r"'([^']*)'", wrong[2]), n=1)
        return f"; did you mean {near[0]!r}?" if near else ""
    unknown = re.match(r"Unrecognized options: --([\w-]+)", text)
    if unknown is None or "--" in text[unknown.end() :]:
        return ""
    near = difflib.get_close_matches(unknown[1].replace("-", "_"), known, n=1)
    return f"; did you mean --{near[0].replace('_', '-')}?" if near else ""


def _in_box(text: str) -> str:
    """What tyro says between the title of its box, which ends in a rule, and the next rule."""
    lines = [line.strip("│ ") for line in text.splitlines()]
    rules = [i for i, line in enumerate(lines) if line and (line[0] == "╭" or not line.strip("─-"))]
    first, last = [*rules, len(lines), len(lines)][:2]
    return " ".join(lines[first + 1 : last]) or text


def _config_path(arguments: list[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        return parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise UserError(f"--config takes a YAML file: {error.message}") from error


def _arguments_of(path: Path, known: dict[str, tuple[Any, Any]]) -> list[str]:
    """The settings of a YAML file as arguments, in the order of the file."""
    if not path.exists():
        raise UserError(f"no settings file {str(path)!r}")
    text = read_text(path)
    with reading(path, "write settings as YAML, a line each, such as lr: 1e-5"):
        values = yaml.load(text, _Settings)
    if values is None:
        return []
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold settings by name, got {short(values)}")
    arguments: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"{path}: unknown setting {short(name)}{hint} Known: {', '.join(known)}"
            )
        kind, default = known[name]
        kinds, flag = typing.get_args(kind) or (kind,), f"--{name.replace('_', '-')}"
        pairs = typing.get_origin(kind) is dict
        missing = value is None and type(None) not in kinds
        nested = isinstance(value, (dict, list)) and not pairs
        odd = not isinstance(value, (*_VALUES, type(None)))
        if missing or nested or odd or isinstance(value, bool) != (kind is bool):
            expected = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
            raise UserError(f"{path}: {name} is {short(value)}, expected {expected}")
        if isinstance(value, bool):
            if value != default:
                arguments.append(flag if value else flag.replace("--", "--no-", 1))
        elif pairs and value is not None:
            if not isinstance(value, (dict, list)):
                raise UserError(f"{path}: {name} is {short(value)}, expected KEY: VALUE below it")
            with reading(f"{name} in {path}"):
                given = as_pairs(value) if isinstance(value, dict) else [*map(str, value)]
            if flags := [pair for pair in given if pair.startswith("-")]:
                raise UserError(f"{path}: {name} has {short(flags[0])}, expected KEY=VALUE")
            arguments += [flag, *given]
        elif value is not None:
            whole = isinstance(value, float) and value.is_integer() and float not in kinds
            arguments.append(f"{flag}={int(value) if whole else value}")
    return arguments


_VALUES = (bool, int, float, str, datetime.date, dict, list)  # of settings


class _Settings(yaml.SafeLoader):
    """YAML without what settings have no use for: aliases, which can grow without end, and keys
    that stand twice, of which one would be dropped."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read: write the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.YAMLError(f"the key {short(twice[0])} stands twice")
        return super().construct_mapping(node, deep)


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
