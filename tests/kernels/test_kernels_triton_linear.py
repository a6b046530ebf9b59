"""The linear operators of a GPU, forward and backward, against fp64 and against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from npo_fast.kernels import OPERATORS
from npo_fast.kernels.transform import HeadTransform
from npo_fast.kernels.triton import linear, registration
from tests.helpers import assert_as_exact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = {"softcap": None, "logit_scale": 1.0}
CAPPED = {"softcap": 4.0, "logit_scale": 0.7, "with_bias": True}
HEADS = {"plain": PLAIN, "capped": CAPPED}
# (shape, head, dtype): on a GPU each is a few compilations, so that not all go with all
CASES = [
    *(
        pytest.param((33, 48, 600), head, dtype, marks=pytest.mark.slow)
        for head in HEADS
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ),
    ((5, 13, 1), "plain", torch.float32),
    ((17, 20, 131), "capped", torch.bfloat16),
    ((16, 8, 64), "capped", torch.float16),
]


def case(rows, width, vocabulary, dtype, with_bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    bias = randn(vocabulary) if with_bias else None
    labels = torch.randint(vocabulary, (rows,), generator=generator).to(DEVICE)
    g = torch.randn(rows, generator=generator).to(DEVICE)
    return randn(rows, width), randn(vocabulary, width) * 0.5, labels, bias, g


def pytorch(hidden, weight, labels, bias, g, softcap, logit_scale, dtype):
    """Log-probs and gradients as plain PyTorch computes them in ``dtype``."""
    leaves = [
        None if one is None else one.to(dtype).requires_grad_() for one in (hidden, weight, bias)
    ]
    raw = F.linear(leaves[0], leaves[1], leaves[2])
    z = raw.to(torch.promote_types(dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_probs = (z * logit_scale).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    grads = torch.autograd.grad(log_probs, [x for x in leaves if x is not None], g.to(log_probs))
    return log_probs.detach(), *grads, *([None] if bias is None else [])


def run(hidden, weight, labels, bias, g, softcap, logit_scale, needs=(True, True, True)):
    head, transform = (hidden, weight, labels, bias), HeadTransform(softcap, logit_scale)
    log_probs, lse = linear.linear_forward(*head, transform)
    return log_probs, *linear.linear_backward(g, *head, log_probs, lse, transform, needs)


@pytest.fixture(autouse=True)
def _several_slices(monkeypatch):
    monkeypatch.setattr(linear, "SLICE_BYTES", 1)
    monkeypatch.setattr(linear, "LEAST_COLUMNS", 256)


@pytest.fixture(autouse=True)
def _poison(poison_new_tensors):
    """Every output and workspace starts as NaN."""


@pytest.mark.parametrize(("shape", "head", "dtype"), CASES, ids=str)
def test_linear_kernels_are_as_exact_as_pytorch(shape, head, dtype):
    head = HEADS[head]
    tensors = case(*shape, dtype, head.get("with_bias", False))
    settings = head["softcap"], head["logit_scale"]
    got = run(*tensors, *settings)
    plain = pytorch(*tensors, *settings, dtype)
    exact = pytorch(*tensors, *settings, torch.float64)
    assert got[0].dtype == torch.float32
    names = "log_probs", "d_hidden", "d_weight", "d_bias"
    for one, other, want, name in zip(got, plain, exact, names, strict=True):
        if want is not None:
            assert_as_exact(one, other, want, name, truncated=DEVICE == "cpu")


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
def test_gradients_of_any_size_are_rounded_to_fp16_once(size):
    """Those of logits would lose digits where they are small; it is the sums that have to fit."""
    hidden, weight, labels, bias, g = case(40, 16, 600, torch.float16, with_bias=True)
    g = g * size
    got = run(hidden, weight, labels, bias, g, None, 1.0)
    exact = pytorch(hidden, weight, labels, bias, g, None, 1.0, torch.float64)
    for one, want in zip(got[1:], exact[1:], strict=True):
        rounded = want.half().double()
        error, least = float((one.double() - want).norm()), float((rounded - want).norm())
        assert error <= 3 * least + 1e-3 * float(want.norm())


def test_memorised_and_saturated_rows_stay_finite_and_exact():
    hidden, weight, labels, _, g = case(9, 16, 150, torch.float32)
    hidden[:4] = weight[labels[:4]] * 40  # memorised: p is 1 in fp32
    hidden[4] *= 1e3  # saturated, most likely at another token
    weight[7] *= 50
    got = run(hidden, weight, labels, None, g, None, 1.0)
    exact = pytorch(hidden, weight, labels, None, g, None, 1.0, torch.float64)
    plain = pytorch(hidden, weight, labels, None, g, None, 1.0, torch.float32)
    for one, other, want in zip(got[:3], plain[:3], exact[:3], strict=True):
        assert one.isfinite().all()
        assert_as_exact(one, other, want)


@pytest.mark.slow
def test_two_runs_are_bit_identical():
    tensors = case(17, 20, 131, torch.bfloat16)
    runs = [run(*tensors, None, 1.0) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*(r[:3] for r in runs), strict=True))


def test_frozen_weight_or_hidden_gets_no_gradient():
    hidden, weight, labels, _, g = case(5, 8, 70, torch.float32)
    both = run(hidden, weight, labels, None, g, None, 1.0)
    frozen = run(hidden, weight, labels, None, g, None, 1.0, needs=(True, False, False))
    assert frozen[2].shape == (0,)
    assert torch.equal(frozen[1], both[1])
    frozen = run(hidden, weight, labels, None, g, None, 1.0, needs=(False, True, False))
    assert frozen[1].shape == (0,)
    assert torch.equal(frozen[2], both[2])


def test_no_rows_give_zero_gradients():
    hidden, weight, labels, bias, g = case(0, 8, 10, torch.float32, with_bias=True)
    log_probs, d_hidden, d_weight, d_bias = run(hidden, weight, labels, bias, g, None, 1.0)
    assert log_probs.shape == (0,)
    assert d_hidden.shape == (0, 8)
    assert d_weight.count_nonzero() == d_bias.count_nonzero() == 0


def test_a_bias_that_is_large_everywhere_changes_nothing():
    """Rows that pad have the bias for their logits, and no logsumexp."""
    *tensors, _, g = case(9, 16, 150, torch.float32)
    want = run(*tensors, torch.zeros(150, device=DEVICE), g, None, 1.0)
    got = run(*tensors, torch.full((150,), 128.0, device=DEVICE), g, None, 1.0)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_rows_of_a_wider_buffer_need_no_copy():
    hidden, weight, labels, _, g = case(6, 16, 40, torch.float32)
    wide = torch.full((6, 24), 3.0, device=DEVICE)
    wide[:, :16] = hidden
    want = run(hidden, weight, labels, None, g, None, 1.0)
    got = run(wide[:, :16], weight, labels, None, g, None, 1.0)
    torch.testing.assert_close(got[:3], want[:3])


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_the_operators_give_on_a_gpu_what_they_give_elsewhere(head):
    """As registered; fp64 and strided columns go to the reference."""
    for dtype, strided in ((torch.float32, False), (torch.float64, False), (torch.float32, True)):
        hidden, weight, labels, bias, g = case(37, 24, 150, dtype, head.get("with_bias", False))
        if strided:
            weight = weight.t().contiguous().t()
        settings = head["softcap"], head["logit_scale"]
        forward = hidden, weight, labels, bias, *settings
        found = registration.kernel("linear_log_probs")(*forward)
        expected = OPERATORS["linear_log_probs"][0](*forward)
        backward = g.to(dtype), hidden, weight, labels, bias, *expected, *settings
        for needs in ([True, True, True], [True, False, False], [False, True, True]):
            gradients = registration.kernel("linear_log_probs_backward")(*backward, needs)
            want = OPERATORS["linear_log_probs_backward"][0](*backward, needs)
            for one, other in zip((*found, *gradients), (*expected, *want), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
