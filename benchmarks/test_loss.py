"""The losses under pytest-benchmark, on a shape that takes seconds.

    pip install 'npo-fast[bench]'
    pytest benchmarks --benchmark-only

Every result is checked against fp64 before it is timed. ``npo-fast bench loss`` measures the
shapes of real models, the peers and peak memory.
"""

import pytest
import torch

from npo_fast.bench.candidates import find_candidates
from npo_fast.bench.fp64_oracle import Oracle
from npo_fast.bench.inputs import Shape, make_inputs
from npo_fast.bench.loss import check
from npo_fast.bench.memory import forward, train

pytest.importorskip("pytest_benchmark", reason="pip install 'npo-fast[bench]'")

CPU = torch.device("cpu")
SHAPE = Shape("tiny", rows=256, width=128, vocabulary=8192, sequences=8)
CANDIDATES = find_candidates(CPU, ["plain"])[0]


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(SHAPE, "random", CPU)


@pytest.fixture(scope="module")
def oracle(inputs):
    return Oracle(inputs)


@pytest.mark.parametrize("pass_", [train, forward], ids=["train", "forward"])
@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.key)
def test_loss(benchmark, candidate, pass_, inputs, oracle):
    check(candidate, inputs, oracle)
    benchmark.extra_info["shape"] = str(SHAPE)
    benchmark(pass_, candidate, inputs)
