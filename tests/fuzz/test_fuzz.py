"""Whatever comes from outside ends in a result or a ``UserError`` of one line, and in nothing else.

``NPO_FAST_FUZZ_SEED`` and ``NPO_FAST_FUZZ_CASES`` (a target) ask for other and more cases:

    NPO_FAST_FUZZ_SEED=7 NPO_FAST_FUZZ_CASES=2000 python -m pytest tests/fuzz -k settings
"""

import os
import resource
import signal
import threading
import traceback
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random

import pytest

from npo_fast.errors import UserError
from tests.fuzz import targets
from tests.fuzz.mutations import copy, mutate_folder
from tests.fuzz.targets import TARGETS
from tests.helpers import save_tiny_model

SEED = int(os.environ.get("NPO_FAST_FUZZ_SEED", "0"))
CASES = int(os.environ.get("NPO_FAST_FUZZ_CASES", "0"))
LONGEST_S = 60  # of a case: a reader that waits for ever
MOST_KIB = 1 << 20  # that a case adds to the memory
LONGEST_MESSAGE = 2600  # characters


class Hangs(BaseException):
    """Raised in a case that takes too long; no reader may catch it."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The sound input of a target, made once."""
    targets.HOME[:] = [save_tiny_model(tmp_path_factory.mktemp("home") / "model")]

    @cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp("sound")
        TARGETS[name].make(folder)
        return folder

    return made


@pytest.mark.parametrize("name", TARGETS)
def test_sound_input_is_read(name, sound, tmp_path):
    copy(sound(name), tmp_path / "input")
    if name != "arguments":
        TARGETS[name].use(tmp_path / "input", _Plain(0))


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_ends_in_a_result_or_a_user_error(name, sound, tmp_path):
    fuzz(name, CASES or TARGETS[name].cases, sound, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_much_damaged_input_ends_in_a_result_or_a_user_error(name, sound, tmp_path):
    fuzz(name, TARGETS[name].cases * 10, sound, tmp_path, first=10_000)


def fuzz(name: str, cases: int, sound, tmp_path: Path, first: int = 0) -> None:
    failures = []
    for case in range(first, first + cases):
        if failure := outcome(name, case, sound(name), tmp_path / "input"):
            failures.append(failure)
    if failures:
        message = f"{len(failures)} of {cases} cases\n" + "\n\n".join(failures)
        pytest.fail(message, pytrace=False)


def outcome(name: str, case: int, made: Path, folder: Path) -> str | None:
    """What is wrong with what a case ends in; None where all is well."""
    rng = Random(f"{SEED}/{name}/{case}")
    copy(made, folder)
    damage = []
    if name != "arguments":
        damage = [mutate_folder(rng, folder) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong = None
    try:
        with warnings.catch_warnings(), at_most(LONGEST_S):
            warnings.simplefilter("ignore")
            TARGETS[name].use(folder, rng)
    except UserError as error:
        message = str(error)
        if "\n" in message or len(message) > LONGEST_MESSAGE or not message.strip():
            wrong = f"the message is no line: {message[:3000]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.format_exception(error)
        wrong = "".join(frames)[-1800:]
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if more > MOST_KIB:
        wrong = f"{more >> 10} MiB of memory"
    if wrong is None:
        return None
    return f"=== NPO_FAST_FUZZ_SEED={SEED}, {name!r}, case {case}, {'; '.join(damage)}:\n{wrong}"


@contextmanager
def at_most(seconds: int):
    """Raises ``Hangs`` inside, where it takes longer."""

    def stop(*_):
        raise Hangs(f"longer than {seconds} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


class _Plain(Random):
    """Draws the first of what there is, and so no odd one."""

    def choice(self, seq):
        return seq[0]
