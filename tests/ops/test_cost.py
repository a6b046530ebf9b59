"""The cost model: which way through the head is taken, and what it costs and holds in truth."""

import random
from dataclasses import replace

import pytest
import torch

from npo_fast import NPO, linear_kl, linear_sequence_loss
from npo_fast.kernels import products
from npo_fast.kernels.layout import column_stride
from npo_fast.ops import cost
from npo_fast.ops.cost import Problem
from npo_fast.ops.gradients import HeadGradients, strips
from npo_fast.ops.head import Head
from npo_fast.ops.linear_log_probs import resolve_chunk_rows, split_rows
from npo_fast.planner.tracker import Tracker
from tests.helpers import slow_but

MIB = 1 << 20
LLAMA, SMALL_HEAD, QWEN = (4096, 128_256), (4096, 32_000), (2048, 151_936)  # D, V
PARALLEL = {"makes_logits": True}  # a slice of the vocabulary a process
FROZEN = {"trains_head": False}

WAYS = [  # rows, (D, V), what else is known, bytes allowed -> way, rows a chunk
    # N <= D: logits lie in the memory of the gradient, whatever may be held
    (1, LLAMA, {}, None, "whole", 1),
    (333, LLAMA, {}, None, "whole", 333),
    (4096, LLAMA, {}, None, "whole", 4096),
    (4096, LLAMA, {}, 1, "whole", 4096),
    (2048, QWEN, {}, None, "whole", 2048),
    (4096, LLAMA, PARALLEL, None, "whole", 4096),
    # D < N <= 2D: no larger than an fp32 gradient
    (4097, LLAMA, {}, None, "whole", 4097),
    (8192, SMALL_HEAD, {}, None, "whole", 8192),
    # beyond: as many rows as the finished gradient has room for
    (8193, SMALL_HEAD, {}, None, "chunks", 4096),
    (16_384, LLAMA, {}, None, "chunks", 4096),
    (20_000, (3000, 50_257), {}, None, "chunks", 2816),
    # few bytes: a slice of the vocabulary after another
    (8192, SMALL_HEAD, {}, 256 * MIB, "slices", 0),
    (16_384, LLAMA, {}, 512 * MIB, "slices", 0),
    # a narrow head adds up sooner than it computes
    (4096, (256, 128_256), {}, None, "slices", 0),
    # no gradient of the head
    (4096, LLAMA, FROZEN, None, "frozen", 1024),
    (100, LLAMA, FROZEN, None, "frozen", 1024),
    (4096, (64, 1_000_000), FROZEN, None, "frozen", 256),
    (16_384, LLAMA, {**FROZEN, **PARALLEL}, 1, "frozen", 1024),
    # processes that share the vocabulary make logits however little may be held
    (16_384, SMALL_HEAD, PARALLEL, 1, "chunks", 4096),
    (4096, (256, 128_256), PARALLEL, None, "chunks", 256),
    # fp32 has no other sum to make room for
    (3000, LLAMA, {"itemsize": 4}, None, "whole", 3000),
    (8192, SMALL_HEAD, {"itemsize": 4}, None, "chunks", 768),
    (8192, SMALL_HEAD, {"itemsize": 4}, 1, "chunks", 768),
    # a CPU
    (500, (576, 49_152), {"itemsize": 4, "on_cpu": True}, None, "whole", 500),
    (4096, (576, 49_152), {"itemsize": 4, "on_cpu": True}, None, "chunks", 576),
    (4096, (576, 49_152), {"itemsize": 4, "on_cpu": True}, 64 * MIB, "slices", 0),
    (1000, (576, 49_152), {"on_cpu": True}, None, "whole", 1000),
    (4096, (576, 49_152), {"itemsize": 4, "on_cpu": True, **FROZEN}, None, "frozen", 512),
]


def problem(rows, head, **known) -> Problem:
    width, vocabulary = head
    return Problem(rows, width, vocabulary, **{"itemsize": 2, **known})


@pytest.mark.parametrize(("rows", "head", "known", "allowed", "name", "chunk_rows"), WAYS)
def test_the_fastest_way_that_fits_is_taken(rows, head, known, allowed, name, chunk_rows):
    way = problem(rows, head, **known).choose(allowed)
    assert (way.name, way.chunk_rows) == (name, chunk_rows)


def test_rows_of_a_chunk_are_whole_tiles_of_a_gpus_gemms():
    for width in range(256, 9000, 97):
        for vocabulary in (32_001, 50_257, 151_936, 5_000_000):
            one = problem(10 * width, (width, vocabulary))
            chunk = one.chunks().chunk_rows
            assert chunk % 256 == 0
            assert width - 256 < chunk <= width, "the logits lie in the finished gradient"
            frozen = replace(one, trains_head=False).frozen().chunk_rows
            assert frozen % 128 == 0
            assert frozen >= 256


def test_no_other_way_that_fits_is_faster():
    draw = random.Random(0)
    for _ in range(300):
        one = problem(
            draw.randint(1, 20_000),
            (draw.choice([64, 576, 1024, 4096]), draw.randint(90, 200_000)),
            itemsize=draw.choice([2, 4]), on_cpu=draw.random() < 0.5,
            makes_logits=draw.random() < 0.3,
        )  # fmt: skip
        allowed = draw.choice([10 * MIB, 100 * MIB, 1000 * MIB])
        way, ways = one.choose(allowed), one.ways(allowed)
        fit = [other for other in ways if other.held_bytes <= allowed]
        if fit:
            assert way in fit
            assert way.time_ms(one.itemsize) == min(w.time_ms(one.itemsize) for w in fit)
        else:
            assert way.held_bytes == min(w.held_bytes for w in ways)


@pytest.mark.parametrize(
    ("rows", "head", "floor_ms", "whole_ms", "chunks_ms"),
    [  # at 740 TFLOP/s and 3 TB/s, bf16; the floor is that of the three GEMMs
        (4096, LLAMA, 17.46, 18.51, 20.26),
        (8192, SMALL_HEAD, 8.71, 9.23, 10.02),
        (2048, QWEN, 5.17, 5.79, 6.83),
        (16_384, LLAMA, 69.8, 74.0, 79.9),
    ],
)
def test_predicted_times_are_those_of_flops_and_bytes(rows, head, floor_ms, whole_ms, chunks_ms):
    one = problem(rows, head)
    whole, chunks, slices = one.ways()
    assert 1e3 * whole.flops / 740e12 == pytest.approx(floor_ms, rel=1e-3)
    assert whole.time_ms(2) == pytest.approx(whole_ms, rel=1e-3)
    assert chunks.time_ms(2) == pytest.approx(chunks_ms, rel=1e-3)
    assert slices.time_ms(2) > 4 / 3 * floor_ms, "a GEMM more"
    assert whole.time_ms(2) < 1.15 * floor_ms


def test_flops_and_bytes_are_those_of_the_table():
    rows, (width, vocabulary) = 10_000, LLAMA
    one, row_bytes = problem(rows, LLAMA), 3 * 2 * rows * vocabulary
    ndv, head, steps = rows * width * vocabulary, width * vocabulary, 3
    whole, chunks, slices = one.ways()
    frozen = replace(one, trains_head=False).frozen()
    assert [w.flops / ndv for w in (whole, chunks, slices, frozen)] == [6, 6, 8, 4]
    assert whole.moved_bytes == frozen.moved_bytes == row_bytes
    # fp32 is read and written by each chunk but the first, then read to write the finished one
    assert chunks.moved_bytes == row_bytes + (8 * steps - 4) * head + (4 + 2) * head
    slice_count = -(-rows * vocabulary * 2 // cost.SLICE_BYTES)
    assert slices.moved_bytes == row_bytes + 8 * rows * width * slice_count
    assert whole.held_bytes == 2 * column_stride(rows, False) * vocabulary
    assert chunks.held_bytes == 4 * head
    assert slices.held_bytes == cost.SLICE_BYTES + 4 * rows * width
    assert problem(3999, LLAMA).whole().held_bytes <= 32 * MIB


# --- how rows and the vocabulary are cut ----------------------------------------------------------


def random_strips(draw: random.Random):
    width = draw.choice([1, 7, 64, 96, 288, 576, 1000])
    vocabulary = draw.choice([1, 2, 131, 1031, 4000, draw.randint(1, 3000)])
    strides = (column_stride(rows, draw.random() < 0.5) for rows in range(width, 0, -1))
    possible = [stride for stride in strides if stride <= width] or [width]
    ahead = width * draw.randint(1, draw.choice([1, 10, vocabulary]))
    return vocabulary, width, draw.choice(possible), ahead


@pytest.mark.parametrize("seed", slow_but(range(8), range(60)))
def test_no_strip_of_the_gradient_reaches_logits_that_are_still_to_be_read(seed):
    """In a memory that knows whose every element is."""
    vocabulary, width, stride, ahead = random_strips(random.Random(seed))
    memory = torch.full((vocabulary * width + ahead,), -1)
    logits = memory[len(memory) - vocabulary * stride :].view(vocabulary, stride)
    tokens = torch.arange(vocabulary).unsqueeze(1)
    logits.copy_(tokens.expand_as(logits))
    written = 0
    for columns in strips(vocabulary, width, stride, ahead):
        assert columns.start == written < columns.stop, "in order, each token once"
        memory[columns.start * width : columns.stop * width] = -2  # by a GEMM that reads ...
        # ... these columns, and leaves the later ones for the next
        assert torch.equal(logits[columns.start :], tokens[columns.start :].expand(-1, stride))
        written = columns.stop
    assert written == vocabulary


def test_strips_are_whole_tiles_and_few():
    cuts = strips(128_256, 4096, 4096, 4096 * 4096)
    assert [cut.stop - cut.start for cut in cuts[:-1]] == [4096] * 31
    first, *rest = strips(128_256, 4096, 512, 4096 * 4096)
    assert (first.stop - first.start) % 256 == 0
    assert first.stop > 7 / 8 * 128_256, "few rows leave nearly all of the gradient's memory free"
    assert len(rest) <= 3


@pytest.mark.parametrize("rows", [1, 500, 961, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_end_where_the_memory_of_the_gradient_ends(rows, dtype):
    weight = torch.empty(50_257, 1024, device="meta", dtype=dtype)
    hidden = torch.empty(rows, 1024, device="meta", dtype=dtype)
    gradients = HeadGradients(Head(weight), hidden, (True, True, False), rows)
    logits, gradient = gradients.logits, gradients.weight
    assert logits.untyped_storage()._cdata == gradient.untyped_storage()._cdata
    end = logits.storage_offset() + len(weight) * logits.stride(1)
    assert end * dtype.itemsize == logits.untyped_storage().nbytes()
    assert logits.shape == (-(-rows // 16) * 16, len(weight))
    assert logits.stride() == (1, -(-rows // 64) * 64)
    ahead = end - len(weight) * 1024
    assert 0 < ahead * dtype.itemsize <= cost.STRIP_BYTES
    assert gradients.strips == strips(len(weight), 1024, logits.stride(1), ahead)


def test_split_rows_covers_all_rows_in_order_and_no_part_is_too_long():
    draw = random.Random(0)
    for _ in range(300):
        first, count = draw.randint(0, 500), draw.randint(0, 3000)
        step = draw.choice([1, 7, 64, 128, 192, 1000, 4096, draw.randint(1, 4000)])
        cut = split_rows(slice(first, first + count), step)
        at = first
        for block in cut:
            assert block.start == at < block.stop <= at + step
            at = block.stop
        assert at == first + count
        if step % 64 == 0:
            assert all((block.start - first) % 64 == 0 for block in cut)
        assert len(cut) <= -(-count // step), "as few as can be"


# --- what is held in truth ------------------------------------------------------------------------


class Held:
    """Bytes alive at the peak beyond inputs, gradients and what is returned."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        self.inputs, self.tracker = inputs, Tracker()
        for one in inputs:
            self.tracker.hold(one, "inputs")

    def mib(self) -> float:
        given = sum(one.nbytes for one in self.inputs)
        gradients = sum(one.nbytes for one in self.inputs if one.requires_grad)
        return (self.tracker.peak - given - gradients) / MIB


def on_meta(rows, head, frozen=False, dtype=torch.bfloat16):
    width, vocabulary = head
    hidden = torch.empty(rows, width, device="meta", dtype=dtype, requires_grad=True)
    weight = torch.empty(vocabulary, width, device="meta", dtype=dtype, requires_grad=not frozen)
    return hidden, weight, torch.empty(rows, device="meta", dtype=torch.int64)


def held_mib(rows, head, frozen=False, sequences=8, dtype=torch.bfloat16, **options) -> float:
    hidden, weight, labels = on_meta(rows, head, frozen, dtype)
    held = Held(hidden, weight, labels)
    bounds = torch.linspace(0, rows, sequences + 1).long()
    ref = torch.empty(sequences, device="meta")
    with held.tracker:
        value, _ = linear_sequence_loss(
            hidden, weight, labels, bounds, NPO(), ref_log_probs=ref, **options
        )
        value.backward()
    return held.mib()


@pytest.mark.parametrize("rows", [1, 1000, 3999, 4096])
def test_the_loss_holds_at_most_64_mib_where_rows_are_no_more_than_the_width(rows):
    """Where all logits of 4096 rows are 1002 MiB."""
    assert held_mib(rows, LLAMA) <= 64


def test_in_fp32_the_loss_holds_at_most_64_mib_too():
    assert held_mib(1999, QWEN, dtype=torch.float32) <= 64


@pytest.mark.parametrize(
    ("rows", "head", "frozen", "way"),
    [
        (6000, SMALL_HEAD, False, "whole"),
        (20_000, SMALL_HEAD, False, "chunks"),
        (16_384, LLAMA, False, "chunks"),
        (10_000, (3000, 50_257), False, "chunks"),
        (5000, LLAMA, True, "frozen"),
    ],
)
def test_predicted_memory_is_what_the_loss_holds(rows, head, frozen, way):
    chosen = problem(rows, head, trains_head=not frozen).choose()
    assert chosen.name == way
    # a copy of the chunk's hidden states, padded; a strip of a product before it is added
    small = 2 * head[0] * min(rows, chosen.chunk_rows) + products.STRIP_BYTES
    held, model = held_mib(rows, head, frozen), chosen.held_bytes / MIB
    assert 0.95 * model <= held <= model + small / MIB + 2


@pytest.mark.parametrize("rows", [3999, 4096])
def test_kl_holds_a_strip_and_a_chunk_of_the_reference(rows):
    hidden, weight, _ = on_meta(rows, LLAMA)
    ref_hidden, ref_weight = (one.detach() for one in on_meta(rows, LLAMA)[:2])
    held = Held(hidden, weight, ref_hidden, ref_weight)
    with held.tracker:
        linear_kl(hidden, weight, ref_hidden, ref_weight).backward()
    assert held.mib() <= 64 + 96 + 8


def test_a_memory_budget_of_the_caller_is_kept():
    weight = torch.empty(32_000, 4096, device="meta", dtype=torch.bfloat16, requires_grad=True)
    for mib, expected in ((None, 4096), (600, 4096), (400, 0)):
        most = None if mib is None else mib * MIB
        assert resolve_chunk_rows("op", Head(weight), 16_384, None, most) == expected
