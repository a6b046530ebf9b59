"""``npo-fast``: one verb a job. Mistakes of the user end in one line and an exit code of 2.

PyTorch takes seconds to import: what needs it is imported where a verb begins.
"""

import difflib
import os
import sys
from collections.abc import Sequence

from npo_fast._version import __version__
from npo_fast.cli.subcommands import SUBCOMMANDS, module_of
from npo_fast.quiet import quieten_libraries
from npo_fast.tables import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code.

    0, 1 (the run failed), 2 (a mistake in the call), 70 (a bug of npo_fast), or 128 + the signal
    that ended it.
    """
    quieten_libraries()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "--help-all", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"npo-fast {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in SUBCOMMANDS:
        near = difflib.get_close_matches(verb, SUBCOMMANDS, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SUBCOMMANDS)}"
        print(printable(f"npo-fast: error: unknown verb {verb!r}; {known}"), file=sys.stderr)
        return 2
    try:
        if {"-h", "--help", "--help-all"} & {*rest}:
            print(_help(verb, every="--help-all" in rest))
            return 0
        if "transformers" not in sys.modules and os.environ.get("RANK", "0") == "0":
            _say_what_loads(verb)
        from npo_fast.cli.running import run_verb
    except KeyboardInterrupt:
        return 130
    return run_verb(verb, rest, as_process=argv is None)


def overview() -> str:
    """The text of ``npo-fast --help``: every subcommand by group, and what holds for all."""
    lines = [
        f"npo-fast {__version__}: make language models forget",
        "",
        "usage: npo-fast VERB [options]",
        "",
        "  npo-fast VERB --help        an example, and the options to begin with",
        "  npo-fast VERB --help-all    every option",
    ]
    for group in dict.fromkeys(verb.group for verb in SUBCOMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {n:<11} {v.help}" for n, v in SUBCOMMANDS.items() if v.group == group]
    return "\n".join([*lines, "", _EVERY_VERB])


_EVERY_VERB = """\
Every verb takes --json (print the result as JSON on standard output) and
--config FILE.yaml (options by name; options on the command line win).

Exit codes: 0 it worked, 1 it failed while it ran, 2 a mistake in the call,
70 a bug of npo-fast, 128 + N ended by signal N (130: Ctrl-C)."""


def _say_what_loads(verb: str) -> None:
    """On standard error, as the messages that follow: the imports may take long."""
    if SUBCOMMANDS[verb].runs_model:
        print("loading PyTorch and transformers", file=sys.stderr, flush=True)
    elif sys.stderr.isatty():
        print("loading PyTorch", file=sys.stderr, flush=True)


def _help(verb: str, every: bool) -> str:
    """The help of a verb: its first options, or every one."""
    from npo_fast.cli.fields import options_of
    from npo_fast.cli.help import long_help, short_help
    from npo_fast.cli.settings import with_common

    about, example = SUBCOMMANDS[verb].help, SUBCOMMANDS[verb].example
    options = options_of(with_common(module_of(verb).Command))
    if every:
        return long_help(verb, about, example, options)
    return short_help(verb, about, example, SUBCOMMANDS[verb].first, options)
