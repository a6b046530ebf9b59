"""Without a network a hub name fails in seconds, and what was downloaded earlier still loads."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import npo_fast
from npo_fast import offline
from npo_fast.errors import UserError
from tests.helpers import FACTS, save_tiny_model, write_jsonl

NOBODY = "http://127.0.0.1:1"  # refuses every connection
LIMIT_S = 60.0  # imports on a busy machine; the hub's libraries alone took as long for each file


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A hub's cache with one model, as a download leaves it, and data."""
    folder = tmp_path_factory.mktemp("offline")
    snapshot = folder / "hub/hub/models--me--tiny/snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(save_tiny_model(folder / "model"), snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    write_jsonl(folder / "forget.jsonl", FACTS[:4])
    return folder


def run(home: Path, *arguments: str) -> tuple[int, str, float]:
    started = time.monotonic()
    names = {"HF_ENDPOINT": NOBODY, "HF_HOME": str(home / "hub"),
             "PYTHONPATH": str(Path(npo_fast.__file__).parents[1])}  # fmt: skip
    environment = {name: each for name, each in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-m", "npo_fast", *arguments], capture_output=True, text=True, cwd=home,
        env=environment | names,
    )  # fmt: skip
    return done.returncode, done.stderr, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("'no/model'", ["unlearn", "--model", "no/model", "--forget", "forget.jsonl"]),
        ("'no/model'", ["plan", "--model", "no/model"]),
        (
            "the dataset 'no/data'",
            ["unlearn", "--model", "model", "--data", "no/data", "--forget", "forget10"],
        ),
    ],
)
def test_a_hub_name_fails_in_seconds_with_one_line(home, what, arguments):
    if arguments[0] == "unlearn":
        arguments = [*arguments, "--method", "NPO", "--output", "run"]
    code, error, time_s = run(home, *arguments)
    assert code == 2
    last = error.splitlines()[-1]
    assert f"cannot reach {NOBODY}, and {what} is not in the hub's cache on this machine" in last
    assert "Traceback" not in error
    assert "Retrying" not in error
    assert time_s < LIMIT_S


@pytest.mark.slow
def test_a_model_in_the_cache_is_used_without_a_network(home):
    code, error, _ = run(
        home, "unlearn", "--model", "me/tiny", "--forget", "forget.jsonl", "--method", "NPO",
        "--epochs", "1", "--no-report", "--output", "cached",
    )  # fmt: skip
    assert code == 0, error
    assert (home / "cached/model/config.json").is_file()
    assert "Retrying" not in error


def test_errors_that_are_not_of_the_network_pass(monkeypatch):
    monkeypatch.setattr(offline, "is_reachable", lambda: False)
    with pytest.raises(KeyError), offline.hub("x"):
        raise KeyError
    with pytest.raises(UserError, match="mine"), offline.hub("x"):
        raise UserError("mine")
