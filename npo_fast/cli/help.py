"""The texts of ``--help``, which shows what one needs first, and of ``--help-all``."""

import shlex
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from npo_fast.cli.fields import Option

WIDEST, COLUMN = 80, 26  # width of the text; column where the help of an option begins


def short_help(
    verb: str, about: str, example: str, first: Sequence[str], options: Sequence[Option]
) -> str:
    """What a verb does, an example, and the options that one needs first, by name."""
    by_name = {option.name: option for option in options}
    shown = [by_name[name] for name in first]
    return "\n".join([
        *_head(verb, about, example, options), "", "Options to begin with:", *_rows(shown), "",
        *_wrapped(f"npo-fast {verb} --help-all shows all {len(options)} options."),
    ])  # fmt: skip


def long_help(verb: str, about: str, example: str, options: Sequence[Option]) -> str:
    """What a verb does, and every option, by group."""
    lines = _head(verb, about, example, options)
    for group in dict.fromkeys(option.group for option in options):
        of_group = (option for option in options if option.group == group)
        lines += ["", *_wrapped(f"{group}:"), *_rows(of_group)]
    return "\n".join(lines)


def command_lines(command: str, indent: str = "  ") -> list[str]:
    """A command as it is typed: broken before an option where it is too long for a line."""
    first, *parts = command.split(" --")
    lines = [indent + first]
    for part in parts:
        if len(lines[-1]) + len(part) + 5 <= _width():
            lines[-1] += f" --{part}"
        else:
            lines[-1] += " \\"
            lines.append(f"{indent}    --{part}")
    return lines


def report_command(run: Path) -> str:
    """The command that makes the page about a run."""
    return shlex.join(["npo-fast", "report", str(run)])


def next_commands(*commands: str) -> list[str]:
    """The lines that say what to type next."""
    return ["next:", *(line for command in commands for line in command_lines(command))]


def _head(verb: str, about: str, example: str, options: Iterable[Option]) -> list[str]:
    words = [option.argument for option in options if option.positional]
    usage = " ".join(["usage: npo-fast", verb, *words, "[options]"])
    return [*_wrapped(f"{about}."), "", usage, "", "Example:", *command_lines(example)]


def _rows(options: Iterable[Option]) -> list[str]:
    """Each option with its help, in two columns."""
    lines = []
    for option in options:
        name = option.argument if option.positional else f"{option.flag} {option.metavar}"
        name, text = f"  {name.rstrip()}", _wrapped(_help(option), " " * COLUMN)
        if len(name) <= COLUMN - 2:
            lines += [name + text[0][len(name) :], *text[1:]]
        else:
            lines += [*_wrapped(name, "  "), *text]
    return lines


def _help(option: Option) -> str:
    """The help text, with the default where there is one to name."""
    default = option.default
    if default in (None, "", "none") or isinstance(default, (bool, dict, tuple)):
        return option.help
    if not isinstance(default, (int, float, str)) and not hasattr(default, "__fspath__"):
        return option.help  # it has none
    return f"{option.help.removesuffix('.')} (default: {default})."


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, _width(), initial_indent=indent if text[:1] != " " else "", subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _width() -> int:
    return max(50, min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST))
