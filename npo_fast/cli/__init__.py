"""``npo-fast``: one verb a job. Mistakes of the user end in one line and an exit code of 2."""

import difflib
import importlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from npo_fast import __version__, watch
from npo_fast.distributed import (
    destroy_process_group,
    is_lost_contact,
    is_main_process,
    local_rank,
    rank,
    world_size,
)
from npo_fast.errors import (
    CannotSaveError,
    Interrupted,
    NonFiniteError,
    OutOfMemory,
    UserError,
    first_line,
    one_line,
    settings_as_flags,
)
from npo_fast.quiet import quieten_libraries
from npo_fast.tables import printable


@dataclass(frozen=True)
class Subcommand:
    """A module of ``npo_fast.cli`` with a dataclass ``Command`` and ``run(command) -> Output``."""

    group: str
    help: str
    example: str
    on_ranks: bool = False
    """Whether several processes can share the work (``torchrun``)."""


SUBCOMMANDS = {
    "demo": Subcommand(
        "Start here",
        "Watch a small model forget half of what it was taught, in 3 minutes, offline",
        "npo-fast demo",
    ),
    "doctor": Subcommand(
        "Start here",
        "Versions, devices, which kernel serves which operator, what is missing",
        "npo-fast doctor",
    ),
    "plan": Subcommand(
        "Start here",
        "The memory that a run will need, on which card it fits, and what makes it fit",
        "npo-fast plan --model meta-llama/Llama-2-7b-chat-hf --card 24",
    ),
    "unlearn": Subcommand(
        "Train",
        "Make a model forget one data set and keep another",
        "npo-fast unlearn --model my-model --forget forget.jsonl --retain retain.jsonl "
        "--output runs/npo",
        on_ranks=True,
    ),
    "finetune": Subcommand(
        "Train",
        "Teach a model a data set (for a model to unlearn from, or a retrained baseline)",
        "npo-fast finetune --model my-model --train facts.jsonl --output runs/taught",
        on_ranks=True,
    ),
    "evaluate": Subcommand(
        "Measure",
        "TOFU's evaluation: model utility, forget quality, answers",
        "npo-fast evaluate --model runs/npo --data locuslab/TOFU --forget forget10 "
        "--retain retain90 --output runs/npo-eval",
        on_ranks=True,
    ),
    "attack": Subcommand(
        "Measure",
        "Is it really gone? Relearn a part of the forget set, round the weights, measure again",
        "npo-fast attack --model runs/npo --data locuslab/TOFU --forget forget10 "
        "--output runs/npo-attack",
        on_ranks=True,
    ),
    "synthetic": Subcommand(
        "Measure",
        "The NPO paper's synthetic experiment and theorem beside its claims, a few minutes",
        "npo-fast synthetic",
    ),
    "reproduce": Subcommand(
        "Measure",
        "Numbers that others published, measured again: expected, measured, within tolerance",
        "npo-fast reproduce --list",
    ),
    "report": Subcommand(
        "Measure",
        "One HTML page about runs: forgetting against utility, curves, answers side by side",
        "npo-fast report runs/npo runs/ga --retrained runs/retrained",
    ),
    "bench": Subcommand(
        "Measure",
        "Time and memory of the losses beside their peers (loss), or the GPU kernels (kernels)",
        "npo-fast bench loss",
    ),
}


MISTAKE = 2  # exit code of a mistake in the call
LATER_S = 15.0  # torchrun looks at its processes more often, and they start at various times
# subcommands that run a model, and measure no time
FIT_THREADS = ("demo", "unlearn", "finetune", "evaluate", "attack", "synthetic", "reproduce")


@settings_as_flags()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code.

    0, 1 (the run failed), 2 (a mistake in the call), 70 (a mistake of npo_fast), or 128 + the
    signal that ended it.
    """
    quieten_libraries()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"npo-fast {__version__}")
        return 0
    verb, *rest = arguments
    try:
        if verb not in SUBCOMMANDS:
            near = difflib.get_close_matches(verb, SUBCOMMANDS, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SUBCOMMANDS)}"
            raise UserError(f"unknown verb {verb!r}; {known}")
        if world_size() > 1 and not SUBCOMMANDS[verb].on_ranks:
            able = ", ".join(name for name, each in SUBCOMMANDS.items() if each.on_ranks)
            raise UserError(
                f"{verb} runs on one process, not on {world_size()}: torchrun is for {able}"
            )
        from npo_fast.cli.console import show, show_messages
        from npo_fast.cli.settings import parse

        show_messages()
        module = importlib.import_module(f"npo_fast.cli.{verb}")
        about = f"{SUBCOMMANDS[verb].help}.\n\nExample: {SUBCOMMANDS[verb].example}"
        command, common = parse(module.Command, rest, verb, about)
        output = _run(module, command, verb, as_process=argv is None)
        show(output, common.json)
    except (CannotSaveError, NonFiniteError, OutOfMemory) as error:
        return _fail(error, 1)
    except UserError as error:
        if world_size() > 1 and error.__cause__ is not None and is_lost_contact(error.__cause__):
            return _fail(_lost_contact(error.__cause__), 1)  # in a library that was asked to try
        return _fail(error, MISTAKE)
    except OSError as error:
        return _fail(one_line(str(error)), 1)
    except Interrupted as stop:
        if is_main_process():
            print(printable(f"npo-fast: {stop}"), file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        return _fail("interrupted; complete checkpoints and records stay where they are", 130)
    except Exception as error:
        if world_size() > 1 and is_lost_contact(error):
            return _fail(_lost_contact(error), 1)
        traceback.print_exc()
        what = f"{type(error).__name__}: {one_line(first_line(error))}"
        return _fail(
            f"a mistake of npo_fast {__version__}, not of yours: {what}. Please report it with the "
            "lines above; complete checkpoints and records stay where they are",
            70,  # EX_SOFTWARE
            what,
        )
    if world_size() > 1:
        destroy_process_group()
    return output.exit_code


def _run(module: Any, command: Any, verb: str, as_process: bool) -> Any:
    """Runs a subcommand; where it is the whole process, with threads that fit its model."""
    if not as_process or verb not in FIT_THREADS:
        return module.run(command)
    from npo_fast.runs.threads import automatic_threads

    with automatic_threads():
        return module.run(command)


def overview() -> str:
    """The text of ``npo-fast --help``: every subcommand by group, with an example."""
    lines = [
        f"npo-fast {__version__}: unlearning for language models on GPUs, one or several, or a CPU",
        "",
        "usage: npo-fast VERB [options]     npo-fast VERB --help shows the options of a verb",
    ]
    for group in dict.fromkeys(verb.group for verb in SUBCOMMANDS.values()):
        lines += ["", f"{group}:"]
        for name, verb in SUBCOMMANDS.items():
            if verb.group == group:
                lines += [f"  {name:<10}{verb.help}", f"            $ {verb.example}"]
    lines += ["", "Every verb takes --json (its result as JSON on standard output) and --config"]
    return "\n".join([*lines, "FILE.yaml (settings, which flags override)."])


def _lost_contact(error: BaseException) -> str:
    """What has become of the other process, as far as it can be found out in seconds."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it meanwhile
    if (failure := watch.failure_of_others()) is not None:
        return f"lost contact with another process of this run: {failure}; {watch.ADVICE}"
    return (
        "lost contact with another process of this run, which has ended or cannot be reached; "
        f"{watch.ADVICE} ({one_line(str(error))})"
    )


def _fail(error: object, code: int, reason: str | None = None) -> int:
    """Prints an error, and tells other processes the ``reason``.

    A mistake in the call is the same on all: ``torchrun`` ends the others when the first of a
    machine has told it, and they tell it where it does not.
    """
    if code == MISTAKE and local_rank():
        watch.tell_others(reason or str(error))
        time.sleep(LATER_S)
    sys.stderr.write(watch.error_line(error, rank(), world_size()))
    sys.stderr.flush()
    watch.tell_others(reason or str(error))
    return code
