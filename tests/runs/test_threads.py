"""Threads by the size of the model and the load of the machine, for a command alone."""

import pytest
import torch

from npo_fast import cli
from npo_fast.cli import doctor, running
from npo_fast.cli.console import Output
from npo_fast.runs import threads
from npo_fast.runs.threads import Machine, automatic_threads, fit_threads, thread_count

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("parameters", "cores", "load", "wish", "expected"),
    [
        (700_000, 2, 0.0, None, 1),  # the demo's model
        (700_000, 64, 0.0, None, 1),
        (700_000, 64, 0.0, 8, 8),  # the user's number, whatever the model
        (10**9, 64, 200.0, 64, 64),
        (10_000_000, 64, 0.0, None, 2),
        (10**9, 64, 0.0, None, 64),
        (10**9, 64, 0.4, None, 64),
        (10**9, 64, 20.2, None, 44),
        (10**9, 64, 200.0, None, 32),  # a busy machine
        (10**9, 2, 30.0, None, 1),
        (0, 1, 0.0, None, 1),
    ],
)
def test_threads_follow_from_size_cores_load_and_wish(parameters, cores, load, wish, expected):
    assert thread_count(parameters, Machine(cores, load, wish)) == expected


@pytest.fixture
def counts(monkeypatch):
    """Of a machine with 8 free cores and no setting: the numbers that PyTorch is told."""
    told = [8]
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(threads.os, "getloadavg", lambda: (1.0, 0.0, 0.0), raising=False)
    return told


def test_a_run_that_goes_on_has_the_threads_that_it_had(counts):
    with automatic_threads():
        fit_threads(10**9, CPU, earlier=3)
        fit_threads(700_000, CPU, earlier=8)
        fit_threads(10**9, CPU, earlier=64)  # on a larger machine
    assert counts == [8, 3, 8, 8]


def test_a_caller_from_python_keeps_his_threads(counts):
    fit_threads(1000, CPU)
    assert counts == [8]


def test_a_command_fits_each_model_says_so_and_restores_the_number(counts, monkeypatch):
    lines = []
    monkeypatch.setattr(threads.logger, "info", lines.append)
    with automatic_threads():
        fit_threads(700_000, CPU)
        fit_threads(700_000, CPU)
        fit_threads(10**9, CPU)  # of the cores at the start, without its own load
        fit_threads(700_000, torch.device("cuda"))
        assert counts == [8, 1, 7]
    assert counts == [8, 1, 7, 8]
    assert len(lines) == 2
    assert lines[0].startswith("threads: 1 of 8, for 0.7M parameters at a load of 1.0; OMP_NUM_")
    fit_threads(1000, CPU)
    assert counts == [8, 1, 7, 8]


@pytest.mark.parametrize("variable", threads.VARIABLES)
def test_the_variables_of_the_user_are_left_alone(counts, monkeypatch, variable):
    monkeypatch.setenv(variable, "8")
    with automatic_threads():
        fit_threads(1000, CPU)
        assert counts == [8]


def test_only_a_process_of_its_own_is_fitted(counts, monkeypatch):
    """``main`` with arguments is a call from Python."""
    monkeypatch.setattr(running, "FIT_THREADS", ("doctor",))
    monkeypatch.setattr(doctor, "run", lambda command: fit_threads(1000, CPU) or Output({}, ""))
    assert cli.main(["doctor"]) == 0
    assert counts == [8]
    monkeypatch.setattr("sys.argv", ["npo-fast", "doctor"])
    assert cli.main() == 0
    assert counts == [8, 1, 8]
