"""The default path of a device never waits for it.

Tensors on ``meta`` have no values: whoever reads one raises, as a CUDA graph does. They take every
branch that a GPU takes, and the operators' shapes stand in for their kernels.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from npo_fast import GA, NPO, SimNPO, linear_sequence_loss
from npo_fast.ops import one_pass
from npo_fast.ops.head import Head
from npo_fast.ops.linear_log_probs import resolve_chunk_rows

ROWS, D, V = 12, 8, 40
BOUNDS = torch.tensor([0, 3, 3, 12], dtype=torch.int32)


class Waits(TorchDispatchMode):
    """Copies that hold the host until the device has finished, and what the device computes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[str] = []
        self.called: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name, kwargs or {}
        self.called.append(name)
        to = kwargs.get("device")
        moves = to is not None and isinstance(args[0], torch.Tensor) and args[0].device != to
        if name == "aten::_to_copy" and moves and not kwargs.get("non_blocking"):
            self.blocking.append(name)
        return function(*args, **kwargs)


def tensors(dtype=torch.bfloat16, vocabulary=V):
    hidden = torch.empty(ROWS, D, device="meta", dtype=dtype, requires_grad=True)
    weight = torch.empty(vocabulary, D, device="meta", dtype=dtype, requires_grad=True)
    return hidden, weight, torch.empty(ROWS, device="meta", dtype=torch.int64)


@pytest.mark.parametrize("loss", [NPO(), SimNPO(), GA()], ids=repr)
@pytest.mark.parametrize("chunk_rows", [None, 5, 0])
@pytest.mark.parametrize("train", [True, False])
def test_a_step_with_offsets_on_the_host_waits_for_nothing(loss, chunk_rows, train):
    ref = torch.empty(3, device="meta")
    with Waits() as waits, torch.set_grad_enabled(train):
        value, _ = linear_sequence_loss(
            *tensors(), BOUNDS, loss, ref_log_probs=ref, chunk_rows=chunk_rows
        )
        if train:
            value.backward()
    assert not waits.blocking


@pytest.mark.parametrize("chunk_rows", [None, 0])
def test_offsets_on_the_device_are_not_read_where_one_chunk_holds_every_row(chunk_rows):
    ref = torch.empty(3, device="meta")
    value, _ = linear_sequence_loss(
        *tensors(), BOUNDS.to("meta"), NPO(), ref_log_probs=ref, chunk_rows=chunk_rows
    )
    value.backward()


def test_a_cuda_graph_never_reads_where_sequences_end(monkeypatch):
    monkeypatch.setattr(one_pass, "capturing", lambda device: True)
    value, _ = linear_sequence_loss(
        *tensors(), BOUNDS.to("meta"), NPO(), ref_log_probs=torch.empty(3, device="meta"),
        chunk_rows=5,
    )  # fmt: skip
    value.backward()


def test_a_group_of_all_sequences_gives_the_numbers_of_chunks(monkeypatch):
    """What a CUDA graph computes instead."""
    hidden, weight = torch.randn(ROWS, D).double(), torch.randn(V, D).double().requires_grad_()
    arguments = hidden, weight, torch.randint(0, V, (ROWS,)), BOUNDS, NPO()
    options = {"ref_log_probs": torch.zeros(3), "chunk_rows": 5}
    runs = []
    for captured in (False, True):
        monkeypatch.setattr(one_pass, "capturing", lambda device, captured=captured: captured)
        value, log_probs = linear_sequence_loss(*arguments, **options)
        runs.append((value, log_probs, *torch.autograd.grad(value, weight)))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)


def test_forward_work_off_the_cpu_makes_no_logits():
    hidden, weight, labels = tensors()
    with Waits() as waits, torch.no_grad():
        linear_sequence_loss(hidden, weight, labels, BOUNDS, GA())
        Head(weight).log_probs(hidden, labels)
    assert waits.called.count("npo_fast::linear_log_probs") == 2
    assert not {"aten::mm", "npo_fast::row_log_probs_"} & set(waits.called)


@pytest.mark.parametrize(
    ("dtype", "vocabulary", "chunked"),
    [
        (torch.bfloat16, 128_256, True),
        (torch.bfloat16, 500_000, False),  # 100 rows
        (torch.float32, 262_144, True),  # 96 rows, enough where a GPU does 20 flops a byte
        (torch.float32, 2_000_000, False),
        (torch.float64, 50_000_000, True),  # no tile kernels
    ],
)
def test_a_chunk_of_few_rows_gives_way_to_the_tile_kernels(dtype, vocabulary, chunked):
    for device, expected in (("meta", chunked), ("cpu", True)):
        weight = torch.empty(1, device=device, dtype=dtype).expand(vocabulary, D)
        assert bool(resolve_chunk_rows("op", Head(weight), 4096, None)) == expected
