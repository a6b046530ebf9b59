"""A frozen dataclass becomes the options of a subcommand; a YAML file may set them first."""

import argparse
import dataclasses
import datetime
import io
import re
import typing
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from npo_fast.boundary import read_text
from npo_fast.cli.fields import Option, options_of
from npo_fast.cli.mistakes import explain, unknown_settings
from npo_fast.data.rendering import as_pairs
from npo_fast.errors import UserError, reading, short
from npo_fast.suggestions import flag_of

T = TypeVar("T")
TYRO = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.HelptextFromCommentsOff,
    tyro.conf.FlagCreatePairsOff,  # --overwrite, but no --no-overwrite
)


@dataclasses.dataclass(frozen=True)
class Common:
    """Options of every command."""

    json: bool = False
    """Print the result as one JSON object on standard output; NaN and infinity are null."""
    config: Path | None = None
    """YAML file with options by name, such as lr: 1e-5; options on the command line win."""


def with_common(command: type[Any]) -> type[Any]:
    """The dataclass of a subcommand with the options of every command."""
    return dataclasses.make_dataclass(
        command.__name__,
        [("common", Common, dataclasses.field(default_factory=Common))],
        bases=(command,),
        frozen=True,
        namespace={"__doc__": command.__doc__},
    )


def parse(command: type[T], arguments: Sequence[str], verb: str) -> tuple[T, Common]:
    """The settings of a subcommand: defaults, then ``--config``, then flags.

    Raises:
        UserError: an option that there is not, a value that it cannot have, or a YAML file that
            cannot be read.
    """
    whole = with_common(command)
    options = options_of(whole)
    path = _config_path(arguments)
    from_file = [] if path is None else _arguments_of(path, options, verb)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parsed: Any = tyro.cli(
                whole, prog=f"npo-fast {verb}", args=[*from_file, *arguments], config=TYRO,
                add_help=False,
            )  # fmt: skip
    except SystemExit as end:
        source = f"; {path} says {' '.join(from_file)}" if from_file else ""
        text = explain([*from_file, *arguments], options, verb)
        text = text or re.sub(r"^Error parsing \w+: |\.$", "", _in_box(said.getvalue()))
        raise UserError(f"{text}{source}") from end
    return parsed, parsed.common


def _in_box(text: str) -> str:
    """What tyro says between the title of its box, which ends in a rule, and the next rule."""
    lines = [line.strip("│ ") for line in text.splitlines()]
    edges = ("╭", "╰")
    rules = [i for i, x in enumerate(lines) if x and (x.startswith(edges) or not x.strip("─-"))]
    first, last = [*rules, len(lines), len(lines)][:2]
    return " ".join(lines[first + 1 : last]) or text


def _config_path(arguments: Sequence[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        return parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise UserError(f"--config takes a YAML file: {error.message}") from error


def _arguments_of(path: Path, options: Sequence[Option], verb: str) -> list[str]:
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
    known = {option.name: option for option in options if not option.positional}
    given = {str(key).replace("-", "_"): value for key, value in values.items()}
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"{path}: {unknown_settings(unknown, known, verb)}")
    arguments: list[str] = []
    for name, value in given.items():
        kind, kinds, flag = known[name].kind, known[name].kinds, flag_of(name)
        pairs = typing.get_origin(kind) is dict
        missing = value is None and type(None) not in kinds
        nested = isinstance(value, (dict, list)) and not pairs
        odd = not isinstance(value, (*_VALUES, type(None)))
        if missing or nested or odd or isinstance(value, bool) != (kind is bool):
            expected = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
            raise UserError(f"{path}: {name} is {short(value)}, expected {expected}")
        if isinstance(value, bool):
            if value != known[name].default:
                arguments.append(flag if value else flag.replace("--", "--no-", 1))
        elif pairs and value is not None:
            if not isinstance(value, (dict, list)):
                raise UserError(f"{path}: {name} is {short(value)}, expected KEY: VALUE below it")
            with reading(f"{name} in {path}"):
                words = as_pairs(value) if isinstance(value, dict) else [*map(str, value)]
            if flags := [word for word in words if word.startswith("-")]:
                raise UserError(f"{path}: {name} has {short(flags[0])}, expected KEY=VALUE")
            arguments += [flag, *words]
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
