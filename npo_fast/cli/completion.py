"""``npo-fast completion``: a script by which a shell completes verbs, options and choices."""

import io
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import tyro

from npo_fast.cli.console import Output
from npo_fast.cli.settings import TYRO, with_common
from npo_fast.cli.subcommands import SUBCOMMANDS, module_of


@dataclass(frozen=True)
class Command:
    """Options of npo-fast completion."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Your shell; the script goes to standard output."""


def run(command: Command) -> Output:
    """Makes the script; it names the options that this version has."""
    script = completion(command.shell)
    return Output({"shell": command.shell, "script": script}, script)


def completion(shell: str) -> str:
    """The script for a shell."""
    verbs: Any = Union[  # noqa: UP007 - of a tuple that is known at run time
        tuple(
            Annotated[
                with_common(module_of(verb).Command),
                tyro.conf.subcommand(verb, description=each.help, prefix_name=False),
            ]
            for verb, each in SUBCOMMANDS.items()
        )
    ]
    script = io.StringIO()
    with redirect_stdout(script), suppress(SystemExit):
        tyro.cli(verbs, prog="npo-fast", args=["--tyro-print-completion", shell], config=TYRO)
    return script.getvalue().strip()
