"""The Triton kernels against fp64: in the interpreter, or on the GPU where there is one."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from npo_fast import NPO, segment_sum
from npo_fast.kernels import OPERATORS, reference
from npo_fast.kernels.layout import empty_logits
from npo_fast.kernels.transform import HeadTransform
from npo_fast.kernels.triton.config import ROW
from npo_fast.kernels.triton.label_logits import label_logits
from npo_fast.kernels.triton.npo_head import npo_head
from npo_fast.kernels.triton.row_log_probs import row_gradient, row_log_probs
from npo_fast.kernels.triton.scale import scale
from tests.helpers import assert_as_exact, free_error, slow_but

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# several blocks of rows, and several slices of the vocabulary a row; or all in one program
SPLIT = replace(ROW["sm_80"], block_rows=4, block_columns=64, programs=7)
WHOLE = replace(ROW["sm_80"], block_rows=16, block_columns=256, programs=1)
HEADS = [(False, None, 1.0), (True, None, 0.25), (True, 30.0, 1.5), (False, 30.0, 1.0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (shape, head, dtype): on a GPU each is a few compilations, so that not all go with all
ROW_CASES = [
    *(
        pytest.param((6, 1000), head, dtype, marks=pytest.mark.slow)
        for head in HEADS
        for dtype in DTYPES
    ),
    pytest.param((6, 300), HEADS[1], torch.float32, marks=pytest.mark.slow),
    *(((1, 1), head, torch.float32) for head in HEADS[1:3]),
    *(((5, 3), head, torch.bfloat16) for head in HEADS[:3]),
    ((3, 256), HEADS[2], torch.float16),
]


@pytest.fixture(autouse=True)
def _poison(poison_new_tensors):
    """An element of an output that no kernel writes is NaN."""


def rows_case(rows, vocabulary, dtype=torch.float32, spread=5.0, seed=0):
    """Logits, column after column as the operators make them; labels; target logits; g."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, generator=generator) * spread).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    target = logits.float().gather(1, labels[:, None]).squeeze(1)
    target = target + 0.01 * torch.randn(rows, generator=generator)
    g = torch.randn(rows, generator=generator)
    labels, target, g = (one.to(DEVICE) for one in (labels, target, g))
    return empty_logits(rows, vocabulary, target, dtype).copy_(logits), labels, target, g


def plain_rows(logits, labels, target, g, softcap, logit_scale):
    """Log-probs, logsumexp and, in the place of the logits, the gradient: PyTorch's."""
    transform = HeadTransform(softcap, logit_scale)
    log_probs, lse, *softmax = reference.row_log_probs(logits, labels, target, transform)
    reference.row_gradient_(logits, labels, log_probs, *softmax, g, transform)
    return log_probs, lse, logits


def exact_rows(logits, labels, target, g, softcap, logit_scale):
    target = None if target is None else target.double()
    return plain_rows(logits.double(), labels, target, g.double(), softcap, logit_scale)


def kernel_rows(logits, labels, target, g, softcap, logit_scale, config):
    settings = HeadTransform(softcap, logit_scale), config
    log_probs, lse, *softmax = row_log_probs(logits, labels, target, *settings)
    row_gradient(logits, labels, log_probs, *softmax, g, *settings)
    return log_probs, lse, logits


def test_a_label_that_is_masked_leaves_its_row_finite():
    """Its log-prob is -inf, the logsumexp that of the others, and the gradient onehot - p."""
    logits, labels, _, g = rows_case(3, 70)
    logits[1, labels[1]] = -torch.inf
    logits[2] = -torch.inf
    logits[2, labels[2]] = 1.5  # all but the label
    expected = plain_rows(logits.clone(), labels, None, g, None, 1.0)
    got = kernel_rows(logits, labels, None, g, None, 1.0, SPLIT)
    assert got[0][1] == -torch.inf
    assert got[0][2] == 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def assert_largest_error_as_exact(got, plain, exact, name=""):
    truncated = DEVICE == "cpu"
    assert_as_exact(got, plain, exact, name, order=torch.inf, truncated=truncated)


@pytest.mark.parametrize("config", slow_but([SPLIT], [SPLIT, WHOLE]), ids=["split", "whole"])
@pytest.mark.parametrize(("shape", "head", "dtype"), ROW_CASES, ids=str)
def test_row_kernels_are_as_exact_as_pytorch(shape, head, dtype, config):
    with_target, *settings = head
    logits, labels, target, g = rows_case(*shape, dtype=dtype)
    target = target if with_target else None
    exact = exact_rows(logits, labels, target, g, *settings)
    plain = plain_rows(logits.clone(), labels, target, g, *settings)
    found = kernel_rows(logits, labels, target, g, *settings, config)
    assert found[0].dtype == found[1].dtype == torch.float32
    names = "log_probs", "lse", "gradient"
    for got, other, want, name in zip(found, plain, exact, names, strict=True):
        assert_largest_error_as_exact(got, other, want, name)


@pytest.mark.parametrize("config", [SPLIT, WHOLE], ids=["split", "whole"])
def test_row_kernels_keep_extreme_rows_finite(config):
    logits, labels, _, _ = rows_case(4, 200)
    g = torch.ones(4, device=DEVICE)
    logits[0] *= 1e4  # saturated
    logits[1] = 0.0  # uniform
    logits[2, labels[2]] = 60.0  # memorised: 1 - p is 0 in fp32 arithmetic on p
    logits[3] = -1e30
    logits[3, labels[3]] = -2e30
    exact = exact_rows(logits, labels, None, g, None, 1.0)
    for got, want in zip(
        kernel_rows(logits, labels, None, g, None, 1.0, config), exact, strict=True
    ):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_gradient_of_a_nearly_sure_token_keeps_its_relative_precision():
    logits = torch.zeros(1, 8, device=DEVICE)
    logits[0, 3] = 14.0
    labels, g = torch.tensor([3], device=DEVICE), torch.ones(1, device=DEVICE)
    exact_log_probs, _, exact = exact_rows(logits, labels, None, g, None, 1.0)
    log_probs, _, gradient = kernel_rows(logits, labels, None, g, None, 1.0, WHOLE)
    for got, want in ((log_probs, exact_log_probs), (gradient[:, 3], exact[:, 3])):
        torch.testing.assert_close(got.double(), want, rtol=free_error(DEVICE), atol=0.0)


def test_a_slice_without_the_label_gets_the_gradient_of_its_columns():
    logits, labels, target, g = rows_case(6, 131)
    whole = logits.clone()
    settings = HeadTransform(5.0, 0.5), SPLIT
    log_probs, _, *softmax = row_log_probs(logits, labels, target, *settings)
    row_gradient(whole, labels, log_probs, *softmax, g, *settings)
    for columns in (slice(0, 70), slice(70, 131)):
        part = logits[:, columns]
        row_gradient(part, labels - columns.start, log_probs, *softmax, g, *settings)
        torch.testing.assert_close(part, whole[:, columns])


def test_row_kernels_take_rows_after_rows_and_leave_what_lies_between_them_alone():
    logits, labels, _, g = rows_case(6, 131)
    by_rows = torch.full((6, 140), 7.0, device=DEVICE)
    by_rows[:, :131] = logits
    by_columns = torch.full((131, 24), 7.0, device=DEVICE)
    by_columns[:, :6] = logits.t()
    kernel_rows(logits, labels, None, g, None, 1.0, SPLIT)
    for view in (by_rows[:, :131], by_columns[:, :6].t()):
        kernel_rows(view, labels, None, g, None, 1.0, SPLIT)
        torch.testing.assert_close(view, logits)
    assert (by_rows[:, 131:] == 7.0).all()
    assert (by_columns[:, 6:] == 7.0).all()


def test_no_rows_launch_nothing():
    logits, g = torch.empty(0, 9, device=DEVICE), torch.empty(0, device=DEVICE)
    labels = torch.empty(0, dtype=torch.int64, device=DEVICE)
    log_probs, lse, _ = kernel_rows(logits, labels, None, g, None, 1.0, WHOLE)
    assert log_probs.shape == lse.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_label_logits_are_not_rounded_to_the_dtype_of_the_weight(dtype, with_bias):
    generator = torch.Generator().manual_seed(1)
    width, vocabulary = 2100, 23  # more than a step
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(DEVICE, dtype)
        for shape in ((7, width), (vocabulary, width), (vocabulary,))
    )
    labels = torch.randint(vocabulary, (7,), generator=generator).to(DEVICE)
    arguments = hidden, weight, labels, bias if with_bias else None
    wide = (None if x is None or x is labels else x.double() for x in arguments)
    hidden_64, weight_64, _, bias_64 = wide
    exact = reference.label_logits(hidden_64, weight_64, labels, bias_64)
    plain = reference.label_logits(*arguments)
    assert_largest_error_as_exact(label_logits(*arguments), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 9001])
def test_scaling_multiplies_and_a_factor_of_one_changes_no_bit(dtype, count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    scaled = values.clone()
    scale(scaled, torch.tensor(1.0, device=DEVICE))
    assert torch.equal(scaled, values)
    scale(scaled, torch.tensor(-0.5, device=DEVICE))
    assert torch.equal(scaled, -0.5 * values)


LENGTHS = {
    "one token each": [1, 1, 1],
    "empty among others": [0, 5, 0, 1030, 0],
    "one sequence": [77],
    "no sequence": [],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
def test_npo_head_is_as_exact_as_pytorch(lengths, offsets_dtype):
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(3)
    log_probs = -torch.rand(tokens, generator=generator).to(DEVICE) * 9
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(offsets_dtype)
    ref = -torch.rand(len(lengths), generator=generator).to(DEVICE) * 50
    got = npo_head(log_probs, cu_seqlens, ref, 0.1)
    exact = reference.npo_head(log_probs.double(), cu_seqlens, ref.double(), 0.1)
    framework = reference.npo_head(log_probs, cu_seqlens, ref, 0.1)
    for one, plain, want in zip(got, framework, exact, strict=True):
        assert one.shape == want.shape
        assert_largest_error_as_exact(one, plain, want)


@pytest.mark.parametrize("r", [-5000.0, -400.0, -1e-3, 0.0, 1e-3, 400.0, 5000.0])
def test_npo_head_stays_exact_for_forgotten_and_memorised_sequences(r):
    log_probs = torch.tensor([-3.0, r], device=DEVICE)
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    ref = torch.tensor([-3.0], device=DEVICE)
    got = npo_head(log_probs, cu_seqlens, ref, 0.1)
    exact = reference.npo_head(log_probs.double(), cu_seqlens, ref.double(), 0.1)
    for one, want in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double(), want, rtol=2e-5, atol=1e-37)


def test_npo_value_and_weight_equal_what_autograd_finds():
    log_probs = -torch.rand(7, dtype=torch.float64) * 9
    cu_seqlens, ref = torch.tensor([0, 3, 3, 7]), torch.tensor([-9.0, -1.0, -30.0]).double()
    values, sequence_log_probs, g = NPO(0.3).value_and_weight(log_probs, cu_seqlens, ref)
    leaf = log_probs.clone().requires_grad_()
    want = NPO(0.3)(leaf, cu_seqlens, ref)
    torch.testing.assert_close(values, want)
    torch.testing.assert_close(sequence_log_probs, segment_sum(log_probs, cu_seqlens))
    torch.testing.assert_close(g, torch.autograd.grad(want.sum(), leaf)[0])


@pytest.mark.slow
def test_two_runs_are_bit_identical():
    logits, labels, target, g = rows_case(9, 777, torch.bfloat16)
    runs = []
    for _ in range(2):
        rows = kernel_rows(logits.clone(), labels, target, g, None, 1.0, SPLIT)
        head = npo_head(rows[0], torch.tensor([0, 4, 9]), rows[0][:2].clone(), 0.1)
        runs.append((*rows, *head))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# a slice of the vocabulary is for CPUs: on a GPU linear_log_probs is one kernel
@pytest.mark.parametrize("op", sorted({*OPERATORS} - {"tile_log_probs_"}))
def test_operators_have_a_gpu_kernel(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"npo_fast::{op}", "CUDA")


@pytest.mark.slow
def test_the_npo_head_operator_keeps_the_rules_of_torch_library():
    log_probs, ref = torch.randn(6), torch.randn(2)
    torch.library.opcheck(
        torch.ops.npo_fast.npo_head.default,
        (log_probs, torch.tensor([0, 2, 6], dtype=torch.int32), ref, 0.1),
    )
