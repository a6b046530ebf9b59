"""The default path of a device never waits for it.

Tensors on ``meta`` have no values: whoever reads one raises, as a CUDA graph does. They take every
branch that a GPU takes, and the operators' shapes stand in for their kernels.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from npo_fast import GA, NPO, SimNPO, linear_sequence_loss
from npo_fast.kernels import layout
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
    assert not {"aten::mm", "npo_fast::row_log_probs"} & set(waits.called)


@pytest.mark.parametrize(
    ("dtype", "rows", "trained", "options", "on_a_gpu", "on_a_cpu"),
    [
        (torch.bfloat16, 2000, True, {}, 2000, 2000),  # in the memory of the gradient
        (torch.bfloat16, 4000, True, {}, 4000, 671),  # no larger than an fp32 gradient
        (torch.bfloat16, 9000, True, {}, 2048, 671),  # as many as the gradient has room for
        (torch.float32, 9000, True, {}, 256, 671),  # 256 MiB, no more than the gradient's
        (torch.float32, 9000, True, {"memory_bytes": 100 << 20}, 256, 262),
        (torch.bfloat16, 9000, False, {}, 1280, 251),  # whole tiles of a GEMM
        (torch.bfloat16, 9000, True, {"memory_bytes": 64 << 20}, 0, 251),  # slices hold less
        (torch.bfloat16, 9000, True, {"chunk_rows": 77}, 77, 77),
    ],
)
def test_each_device_gets_the_chunk_rows_that_suit_it(
    dtype, rows, trained, options, on_a_gpu, on_a_cpu, monkeypatch
):
    monkeypatch.setattr(layout, "cpu_multiplies_bf16", lambda: False)
    for device, expected in (("meta", on_a_gpu), ("cpu", on_a_cpu)):
        weight = torch.empty(1, 1, device=device, dtype=dtype).expand(100_000, 2048)
        weight.requires_grad_(trained)
        options = {"chunk_rows": None, **options}
        assert resolve_chunk_rows("op", Head(weight), rows, **options) == expected, device
