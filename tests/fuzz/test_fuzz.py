"""Whatever comes from outside ends in a result or a ``UserError`` of one line, and in nothing else.

``NPO_FAST_FUZZ_SEED`` and ``NPO_FAST_FUZZ_CASES`` (a target) ask for other and more cases:

    NPO_FAST_FUZZ_SEED=7 NPO_FAST_FUZZ_CASES=2000 python -m pytest tests/fuzz -k settings
"""

import gzip
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

from npo_fast.boundary import read_bytes
from npo_fast.cli import main
from npo_fast.data import files
from npo_fast.data.readers import load_records
from npo_fast.errors import UserError, reading
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


MISTAKES = {  # JSON Lines, and what the message has to say
    "deep": ('{"text": ' + "[" * 1000 + "]" * 1000 + "}", "line 1: too many brackets"),
    "deeper": ("[" * 100_000, "line 1: too many brackets"),
    "digits": ('{"text": ' + "9" * 5000 + "}", "line 1: a number of thousands of digits"),
    "half a character": (r'{"text": "\ud800"}', "record 1: .*lone surrogate"),
    "role": ('{"messages": [{"role": [], "content": "x"}]}', "record 1: .*unknown role \\[\\]"),
    "number": ("1\n2", "record 1: expected a JSON object, got int"),
    "escape": ('{"messages": [{"role": "\\u001b[31m", "content": "x"}]}', r"\\x1b\[31m"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_records_is_told_with_its_place(tmp_path, case):
    content, message = MISTAKES[case]
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=rf"x.jsonl.*{message}") as caught:
        load_records(file)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("part", ["-:", ":-", "1e3:", "٣:", "a:b", "1.5:", "9" * 30 + ":"])
def test_a_slice_of_no_numbers_is_refused(tmp_path, part):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="no place of a record"):
        load_records(f"{tmp_path / 'x.jsonl'}[{part}]")


@pytest.mark.parametrize("what", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, what):
    path = tmp_path / "x.jsonl"
    make = {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"),
            "folder": path.mkdir, "loop": lambda: path.symlink_to(path.name)}  # fmt: skip
    make[what]()
    with at_most(20), pytest.raises(UserError, match="cannot read .*x.jsonl"):
        read_bytes(path)


def test_a_file_that_unpacks_to_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_UNPACKED", 1 << 20)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b" " * (1 << 23)))
    with pytest.raises(UserError, match="unpacks to more than"):
        load_records(tmp_path / "x.jsonl.gz")


def test_a_message_is_one_line_without_control_characters():
    assert str(UserError("a\nb\x1b[31m\ud800\u202e")) == r"a b\x1b[31m\ud800\u202e"
    assert len(str(UserError("x" * 10**6))) < 2500


def test_reading_hides_no_mistake_of_ours():
    with pytest.raises(NameError), reading("x"):
        nothing  # noqa: B018, F821


def test_an_unexpected_error_has_a_line_and_an_exit_code_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr("npo_fast.cli.doctor.run", lambda command: {}["no\nkey"])
    assert main(["doctor"]) == 70
    *trace, line = capsys.readouterr().err.splitlines()
    assert "Traceback" in trace[0]
    assert line.startswith("npo-fast: error: a mistake of npo_fast")


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
