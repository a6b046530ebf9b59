"""Fixtures: a fixed seed, memory that shows what no kernel wrote, data beside the checkout."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("NPO_FAST_SHARED", Path(__file__).parents[2] / "shared"))

if not torch.cuda.is_available():
    # before the first import of Triton: its kernels run on the CPU, in the interpreter
    os.environ["TRITON_INTERPRET"] = "1"
    # tensors of tests are tiny, and the workers of pytest-xdist share the cores
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the same, without the queues of devices that are not there: 3 ms a test
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _few_resamples() -> Iterator[None]:
    """Intervals of 50 resamples, not of 1000, which take seconds a log (``all_resamples``)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npo_fast.metrics.intervals.RESAMPLES", 50)
        yield


@pytest.fixture
def all_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the intervals themselves."""
    monkeypatch.setattr("npo_fast.metrics.intervals.RESAMPLES", 1000)


@pytest.fixture
def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """``new_empty`` and ``empty_like`` return NaN: an element that no kernel writes shows."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: object, **kwargs: object) -> torch.Tensor:
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: set NPO_FAST_SHARED to the folder that holds {name}/")
    return folder


@pytest.fixture(scope="session")
def tofu() -> Path:
    """TOFU's JSON files."""
    return _shared("tofu")


@pytest.fixture(scope="session")
def tofu_logs() -> Path:
    """Published evaluation logs."""
    return _shared("tofu_logs")
