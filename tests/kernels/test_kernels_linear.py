"""The operators from hidden states to log-probs and back: the specification against fp64."""

import pytest
import torch
from torch import Tensor

from npo_fast.kernels import OPERATORS, reference

ops = torch.ops.npo_fast
HEADS = [(None, 1.0, False), (4.0, 0.7, True)]
EVERYTHING = [True, True, True]


@pytest.fixture(autouse=True)
def _narrow_tiles(monkeypatch):
    """Several slices of the vocabulary, the last one not full; outputs start as NaN."""
    monkeypatch.setattr(reference, "TILE_BYTES", 1)
    monkeypatch.setattr(reference, "LEAST_COLUMNS", 48)


def case(rows, dtype=torch.float64, bias=True, width=12, vocabulary=131):
    hidden, weight = torch.randn(rows, width, dtype=dtype), torch.randn(vocabulary, width).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,))
    return hidden, weight, labels, torch.randn(vocabulary).to(dtype) if bias else None


def plain(hidden, weight, labels, bias, softcap, logit_scale) -> tuple[Tensor, Tensor]:
    z = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) * logit_scale
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    lse = z.logsumexp(-1)
    return z.gather(1, labels[:, None]).squeeze(1) - lse, lse


def plain_gradients(g, hidden, weight, labels, bias, softcap, logit_scale):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
    log_probs, _ = plain(leaves[0], leaves[1], labels, leaves[2], softcap, logit_scale)
    return torch.autograd.grad(log_probs @ g.to(log_probs), [t for t in leaves if t is not None])


@pytest.mark.parametrize(("softcap", "logit_scale", "bias"), HEADS)
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_log_probs_and_gradients_are_those_of_plain_pytorch(rows, softcap, logit_scale, bias):
    tensors, g = case(rows, bias=bias), torch.randn(rows, dtype=torch.float64)
    found = ops.linear_log_probs(*tensors, softcap, logit_scale)
    for one, want in zip(found, plain(*tensors, softcap, logit_scale), strict=True):
        torch.testing.assert_close(one, want)
    gradients = ops.linear_log_probs_backward(g, *tensors, *found, softcap, logit_scale, EVERYTHING)
    wanted = plain_gradients(g, *tensors, softcap, logit_scale)
    for one, want in zip(gradients, wanted, strict=False):
        torch.testing.assert_close(one, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype):
    tensors, g = case(64, dtype), torch.randn(64)
    settings = 4.0, 0.7
    wide = [t if t.dtype == torch.int64 else t.double() for t in tensors]
    log_probs, lse = ops.linear_log_probs(*tensors, *settings)
    ours = ops.linear_log_probs_backward(g, *tensors, log_probs, lse, *settings, EVERYTHING)
    exact = [*plain(*wide, *settings), *plain_gradients(g, *wide, *settings)]
    theirs = [*plain(*tensors, *settings), *plain_gradients(g, *tensors, *settings)]
    for found, other, want in zip((log_probs, lse, *ours), theirs, exact, strict=True):
        error, bound = (float((one.double() - want).norm() / want.norm()) for one in (found, other))
        assert error <= max(2 * bound, torch.finfo(torch.float32).eps)
        assert found.dtype == other.dtype


def test_memorised_rows_do_not_cancel():
    hidden, weight = torch.eye(3) * 17.0, torch.eye(3)
    labels, g = torch.arange(3), torch.ones(3)
    _, lse = ops.linear_log_probs(hidden, weight, labels, None, None, 1.0)
    exact_log_probs, _ = plain(hidden.double(), weight.double(), labels, None, None, 1.0)
    settings = None, 1.0, EVERYTHING
    d_hidden, *_ = ops.linear_log_probs_backward(
        g, hidden, weight, labels, None, exact_log_probs.float(), lse, *settings
    )
    exact = plain_gradients(g, hidden.double(), weight.double(), labels, None, None, 1.0)[0]
    torch.testing.assert_close(d_hidden.diag().double(), exact.diag(), rtol=1e-5, atol=0)


def test_what_is_not_wanted_comes_back_empty():
    tensors, g = case(5), torch.randn(5, dtype=torch.float64)
    found = ops.linear_log_probs(*tensors, None, 1.0)
    full = ops.linear_log_probs_backward(g, *tensors, *found, None, 1.0, EVERYTHING)
    for at in range(3):
        needs = [i == at for i in range(3)]
        part = ops.linear_log_probs_backward(g, *tensors, *found, None, 1.0, needs)
        for i in range(3):
            assert torch.equal(part[i], full[i]) if needs[i] else part[i].shape == (0,)


def test_nothing_is_as_wide_as_the_vocabulary(monkeypatch):
    tensors, g = case(40, vocabulary=900, bias=False), torch.randn(40, dtype=torch.float64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    arguments = (*tensors, None, 1.0)
    with Watch():
        found = OPERATORS["linear_log_probs"][0](*arguments)
        OPERATORS["linear_log_probs_backward"][0](g, *tensors, *found, None, 1.0, EVERYTHING)
    assert largest == 900 * 12, "the gradient of the head; a slice of logits is 40 x 48"


@pytest.mark.slow
@pytest.mark.parametrize(("softcap", "logit_scale", "bias"), HEADS)
def test_the_operators_keep_the_rules_of_torch_library(softcap, logit_scale, bias):
    tensors, settings = case(6, torch.float32, bias), (softcap, logit_scale)
    torch.library.opcheck(ops.linear_log_probs.default, (*tensors, *settings))
    found = ops.linear_log_probs(*tensors, *settings)
    for needs in (EVERYTHING, [True, False, False]):
        torch.library.opcheck(
            ops.linear_log_probs_backward.default,
            (torch.randn(6), *tensors, *found, *settings, needs),
        )
