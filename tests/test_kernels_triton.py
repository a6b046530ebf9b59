"""The Triton kernels against fp64: in the interpreter, or on the GPU where there is one."""

import pytest
import torch

pytest.importorskip("triton")

from npo_fast import NPO, segment_sum
from npo_fast.kernels import reference
from npo_fast.kernels.triton.config import RowConfig
from npo_fast.kernels.triton.npo_head import npo_head
from npo_fast.kernels.triton.row_log_probs import row_log_probs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STREAMED = RowConfig(block=256, on_chip_columns=0, columns_per_warp=64, max_warps=4)
ON_CHIP = RowConfig(block=256, on_chip_columns=4096, columns_per_warp=64, max_warps=4)
ROW_SHAPES = [(1, 1), (5, 3), (6, 1000), (3, 256)]


@pytest.fixture(autouse=True)
def _poison(poison_new_tensors):
    """An element of an output that no kernel writes is NaN."""


def rows_case(rows, vocabulary, dtype=torch.float32, spread=5.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, generator=generator) * spread).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    target = logits.float().gather(1, labels[:, None]).squeeze(1)
    target = target + 0.01 * torch.randn(rows, generator=generator)
    return logits.to(DEVICE), labels.to(DEVICE), target.to(DEVICE)


def row_oracle(logits, labels, target, softcap, logit_scale):
    exact = logits.double()
    log_probs, lse = reference.row_log_probs_(
        exact, labels, None if target is None else target.double(), softcap, logit_scale
    )
    return log_probs, lse, exact


def assert_error_at_most_twice(got, framework, exact):
    """Largest error against fp64 at most twice PyTorch's; an ulp of the largest is free."""
    if not exact.numel():
        return
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (framework.double() - exact).abs().max().item()
    # the interpreter truncates fp32 to bf16, where a GPU rounds
    truncated = got.dtype == torch.bfloat16 and DEVICE == "cpu"
    eps = torch.finfo(torch.bfloat16 if truncated else torch.float32).eps
    assert error <= allowed + eps * exact.abs().max().item()


@pytest.mark.parametrize("config", [STREAMED, ON_CHIP], ids=["streamed", "on_chip"])
@pytest.mark.parametrize(
    ("with_target", "softcap", "logit_scale"),
    [(False, None, 1.0), (True, None, 0.25), (True, 30.0, 1.5), (False, 30.0, 1.0)],
)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_row_kernel_is_as_exact_as_pytorch(shape, with_target, softcap, logit_scale, config):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits, labels, target = rows_case(*shape, dtype=dtype)
        target = target if with_target else None
        exact = row_oracle(logits, labels, target, softcap, logit_scale)
        framework_gradient = logits.clone()
        framework = reference.row_log_probs_(
            framework_gradient, labels, target, softcap, logit_scale
        )

        forward = row_log_probs(
            logits, labels, target, softcap, logit_scale, in_place=False, config=config
        )
        gradient = logits.clone()
        backward = row_log_probs(
            gradient, labels, target, softcap, logit_scale, in_place=True, config=config
        )
        for got in (forward, backward):
            assert got[0].dtype == got[1].dtype == torch.float32
            assert_error_at_most_twice(got[0], framework[0], exact[0])
            assert_error_at_most_twice(got[1], framework[1], exact[1])
        assert_error_at_most_twice(gradient, framework_gradient, exact[2])


@pytest.mark.parametrize("config", [STREAMED, ON_CHIP], ids=["streamed", "on_chip"])
def test_row_kernel_keeps_extreme_rows_finite(config):
    logits, labels, _ = rows_case(4, 200)
    logits[0] *= 1e4  # saturated
    logits[1] = 0.0  # uniform
    logits[2, labels[2]] = 60.0  # memorised: 1 - p is 0 in fp32 arithmetic on p
    logits[3] = -1e30
    logits[3, labels[3]] = -2e30
    exact = row_oracle(logits, labels, None, None, 1.0)
    log_probs, lse = row_log_probs(logits, labels, None, None, 1.0, in_place=True, config=config)
    for got, want in zip((log_probs, lse, logits), exact, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_gradient_of_a_nearly_sure_token_keeps_its_relative_precision():
    logits = torch.zeros(1, 8, device=DEVICE)
    logits[0, 3] = 14.0
    labels = torch.tensor([3], device=DEVICE)
    target = logits[0, 3:4].clone()
    log_probs, _ = row_log_probs(logits, labels, target, None, 1.0, in_place=True, config=ON_CHIP)
    want = -torch.expm1(log_probs.double())
    torch.testing.assert_close(logits[0, 3].double(), want[0], rtol=1e-6, atol=0.0)


def test_row_kernel_honours_row_stride_and_leaves_the_padding_alone():
    padded = torch.full((6, 140), 7.0, device=DEVICE)
    logits, labels, _ = rows_case(6, 131)
    padded[:, :131] = logits
    view = padded[:, :131]
    row_log_probs(view, labels, None, None, 1.0, in_place=True, config=STREAMED)
    row_log_probs(logits, labels, None, None, 1.0, in_place=True, config=STREAMED)
    assert torch.equal(view, logits)
    assert (padded[:, 131:] == 7.0).all()


def test_no_rows_launch_nothing():
    logits = torch.empty(0, 9, device=DEVICE)
    labels = torch.empty(0, dtype=torch.int64, device=DEVICE)
    log_probs, lse = row_log_probs(logits, labels, None, None, 1.0, in_place=True)
    assert log_probs.shape == lse.shape == (0,)


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
        assert_error_at_most_twice(one, plain, want)


@pytest.mark.parametrize("r", [-5000.0, -400.0, -1e-3, 0.0, 1e-3, 400.0, 5000.0])
def test_npo_head_at_forgotten_and_memorised_sequences(r):
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


def test_two_runs_are_bit_identical():
    logits, labels, target = rows_case(9, 777, torch.bfloat16)
    runs = []
    for _ in range(2):
        gradient = logits.clone()
        log_probs, lse = row_log_probs(
            gradient, labels, target, None, 1.0, in_place=True, config=STREAMED
        )
        head = npo_head(log_probs, torch.tensor([0, 4, 9]), log_probs[:2].clone(), 0.1)
        runs.append((gradient, log_probs, lse, *head))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# a slice of the vocabulary is for CPUs: on a GPU linear_log_probs is one kernel
@pytest.mark.parametrize("op", sorted({*reference.OPERATORS} - {"tile_log_probs_"}))
def test_operators_have_a_gpu_kernel(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"npo_fast::{op}", "CUDA")


def test_npo_head_operator_follows_the_library_contract():
    log_probs, ref = torch.randn(6), torch.randn(2)
    torch.library.opcheck(
        torch.ops.npo_fast.npo_head.default,
        (log_probs, torch.tensor([0, 2, 6], dtype=torch.int32), ref, 0.1),
    )
