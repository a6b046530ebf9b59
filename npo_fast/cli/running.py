"""One verb from its arguments to its exit code, whatever ends it."""

import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

from npo_fast import __version__, watch
from npo_fast.cli.console import show, show_messages
from npo_fast.cli.settings import parse
from npo_fast.cli.subcommands import SUBCOMMANDS, module_of
from npo_fast.distributed import (
    check_launch,
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
from npo_fast.tables import printable

MISTAKE = 2  # exit code of a mistake in the call
LATER_S = 15.0  # torchrun looks at its processes more often, and they start at various times
FIT_THREADS = tuple(verb for verb, each in SUBCOMMANDS.items() if each.runs_model)


@settings_as_flags()
def run_verb(verb: str, arguments: Sequence[str], as_process: bool) -> int:
    """Runs a verb; returns the exit code.

    Args:
        as_process: whether it is all that this process is for.
    """
    try:
        check_launch()
    except UserError as error:  # what is below asks which process this is
        sys.stderr.write(watch.error_line(error, 0, 1))
        return MISTAKE
    try:
        if world_size() > 1 and not SUBCOMMANDS[verb].on_ranks:
            able = ", ".join(name for name, each in SUBCOMMANDS.items() if each.on_ranks)
            raise UserError(
                f"{verb} runs on one process, not on {world_size()}: torchrun is for {able}"
            )
        show_messages()
        module = module_of(verb)
        command, common = parse(module.Command, arguments, verb)
        output = _run(module, command, verb, as_process)
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
