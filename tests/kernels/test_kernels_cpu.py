"""The C++ row kernels against plain PyTorch, in fp64 and in their own dtype."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from npo_fast import linear_kl, linear_log_probs
from npo_fast.kernels import OPERATORS, cpu
from tests.helpers import slow_but

pytestmark = pytest.mark.skipif(
    cpu.library_path() is None,
    reason="the C++ kernels are not built: python setup.py build_ext --inplace",
)

OPS = torch.ops.npo_fast
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (5, 7), (3, 127), (4, 1000), (2, 49157))
SETTINGS = ((None, 1.0), (30.0, 1.0), (None, 0.5), (2.0, -1.5))  # softcap, logit_scale

# the operators' plain PyTorch kernels, with the same arguments
REFERENCE = SimpleNamespace(**{name: kernel for name, (kernel, _) in OPERATORS.items()})
Result = tuple[Tensor, Tensor, Tensor]  # log_probs, lse, gradient


def plain_pytorch(
    raw: Tensor, labels: Tensor, softcap: float | None = None, logit_scale: float = 1.0
) -> Result:
    """What a user would write: log_softmax and autograd, at least in fp32."""
    leaf = raw.detach().clone().requires_grad_()
    z = leaf.to(torch.promote_types(raw.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z * logit_scale
    log_probs = z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(log_probs.sum(), leaf)
    return log_probs.detach(), z.detach().logsumexp(-1), gradient


def both_(
    logits: Tensor,  # on return the gradient of the sum of the log-probs
    labels: Tensor,
    target: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ops: Any = OPS,
) -> tuple[Tensor, Tensor]:  # log_probs, lse
    log_probs, lse, *softmax = ops.row_log_probs(logits, labels, target, softcap, logit_scale)
    g = torch.ones_like(log_probs)
    ops.row_gradient_(logits, labels, log_probs, *softmax, g, softcap, logit_scale)
    return log_probs, lse


def fused(
    raw: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    target: Tensor | None = None,
) -> Result:
    """The log-probs, then the gradient of their sum."""
    gradient = raw.clone()
    return *both_(gradient, labels, target, softcap, logit_scale), gradient


def tiled(
    raw: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    columns: int = 64,
) -> tuple[Tensor, Tensor]:
    """log_probs and lse from slices of the vocabulary, one after another."""
    others = torch.full((len(raw),), -torch.inf, dtype=torch.float64)
    target = torch.full_like(others, torch.nan)
    for first in range(0, raw.shape[1], columns):
        tile = raw[:, first : first + columns]
        OPS.tile_log_probs_(tile, labels - first, softcap, logit_scale, others, target)
    high, low = torch.maximum(others, target), torch.minimum(others, target)
    above = torch.log1p(torch.exp(low - high))
    wide = torch.promote_types(raw.dtype, torch.float32)
    return ((target - high) - above).to(wide), (high + above).to(wide)


def random_rows(rows: int, vocabulary: int, dtype: torch.dtype, spread: float = 4.0) -> Tensor:
    return (torch.randn(rows, vocabulary) * spread).to(dtype)


def random_labels(rows: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (rows,))


def rounding_bounds(raw: Tensor, softcap: float | None, logit_scale: float) -> list[float]:
    """What fp32 roundings may do to log_probs and lse (absolute) and to the gradient (relative).

    To first order in u = 2^-24, for any order of operations, with or without fused products. z has
    one rounding, or six with a cap (a quotient, two products, and tanh within three). log_probs and
    lse have two z in them, and two roundings of their own size, which is at most ``2 |z| + log V``.
    The gradient is ``exp(z - shift) * share * slope * g``: the error of z and the rounding of the
    difference, at most 2 |z| in size, pass through exp; exp, share, slope and products have ten.
    The errors of the terms of a sum average out.
    """
    unit = torch.finfo(torch.float32).eps / 2
    z = raw[raw.isfinite()].double().abs().max().item()
    if softcap is not None:
        z = softcap * math.tanh(z / softcap)
    z *= abs(logit_scale)
    of_z = (1 if softcap is None else 6) * z
    of_sum = 2 * of_z + 2 * (2 * z + math.log(raw.shape[1]))
    return [unit * of_sum, unit * of_sum, unit * (of_z + 2 * z + 10)]


def assert_as_accurate(
    raw: Tensor,
    setting: tuple[float | None, float],
    ours: Result,
    plain: Result,
    exact: Result,
) -> None:
    """Error against fp64 at most twice that of plain PyTorch, or what rounding explains."""
    bounds = rounding_bounds(raw, *setting)
    bounds[2] *= exact[2].abs().max().item()
    for name, got, other, truth, bound in zip(
        ("log_probs", "lse", "gradient"), ours, plain, exact, bounds, strict=True
    ):
        assert got.dtype == other.dtype
        error, allowed = ((x.double() - truth).abs().max().item() for x in (got, other))
        if got.dtype != torch.float32:  # it is rounded to half precision once more
            bound += torch.finfo(got.dtype).eps / 2 * truth.abs().max().item()
        assert error <= max(2 * allowed, bound), f"{name}: {error:.3g}, PyTorch {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_errors_are_at_most_twice_those_of_plain_pytorch(
    shape: tuple[int, int], dtype: torch.dtype, setting: tuple[float | None, float]
) -> None:
    raw, labels = random_rows(*shape, dtype), random_labels(*shape)
    ours = fused(raw, labels, *setting)
    assert_as_accurate(
        raw,
        setting,
        ours,
        plain_pytorch(raw, labels, *setting),
        plain_pytorch(raw.double(), labels, *setting),
    )
    log_probs, lse = tiled(raw, labels, *setting, columns=700)
    assert_as_accurate(
        raw, setting, (log_probs, lse, ours[2]), ours, plain_pytorch(raw.double(), labels, *setting)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_fp64_logits_stay_fp64(shape: tuple[int, int], setting: tuple[float | None, float]) -> None:
    raw, labels = random_rows(*shape, torch.float64), random_labels(*shape)
    ours = fused(raw, labels, *setting)
    for got, truth in zip(ours, plain_pytorch(raw, labels, *setting), strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_target_logits_replace_the_logit_at_the_label(
    dtype: torch.dtype, setting: tuple[float | None, float]
) -> None:
    wide, labels = random_rows(6, 1000, torch.float32), random_labels(6, 1000)
    raw = wide.to(dtype)
    target = wide.gather(1, labels[:, None]).squeeze(1)
    if setting[0] is None:  # a softcap has the slope of the logit that is stored
        target = torch.randn(6) * 4
        wide = raw.float().scatter(1, labels[:, None], target[:, None])
    ours = fused(raw, labels, *setting, target)
    plain, exact = (plain_pytorch(x, labels, *setting) for x in (wide, wide.double()))
    if setting[0] is not None:
        of_raw = raw.double().scatter(1, labels[:, None], target.double()[:, None])
        plain = (*plain[:2], plain_pytorch(raw, labels, *setting)[2])
        exact = (*plain_pytorch(of_raw, labels, *setting)[:2], exact[2])
    assert_as_accurate(wide, setting, ours, (*plain[:2], plain[2].to(dtype)), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_memorised_token_keeps_its_digits(dtype: torch.dtype) -> None:
    """log p = -1e-13 rounds to 0 in ``z - logsumexp(z)``; it and 1 - p come out right here."""
    raw, labels = random_rows(4, 1000, dtype, spread=1.0), random_labels(4, 1000)
    raw.scatter_(1, labels[:, None], 40.0)
    log_probs, _, gradient = fused(raw, labels)
    rest = raw.double().scatter(1, labels[:, None], -torch.inf).logsumexp(-1)
    exact = -torch.log1p(torch.exp(rest - 40.0))
    torch.testing.assert_close(log_probs, exact.float(), rtol=2e-6, atol=0)
    torch.testing.assert_close(tiled(raw, labels)[0], exact.float(), rtol=2e-6, atol=0)
    if dtype != torch.float16:  # 1e-13 is 0 there
        at_label = gradient.gather(1, labels[:, None]).squeeze(1).double()
        torch.testing.assert_close(at_label, -torch.expm1(exact), rtol=1e-2, atol=0)


@pytest.mark.parametrize("spread", [1e-3, 100.0, 1e4])
def test_tiny_and_huge_logits_are_as_accurate_as_plain_pytorch(spread: float) -> None:
    raw, labels = random_rows(4, 1000, torch.float32, spread), random_labels(4, 1000)
    ours = fused(raw, labels)
    exact = plain_pytorch(raw.double(), labels)
    assert_as_accurate(raw, (None, 1.0), ours, plain_pytorch(raw, labels), exact)


@pytest.mark.parametrize("setting", SETTINGS[:3], ids=str)
def test_masked_logits_have_no_probability(setting: tuple[float | None, float]) -> None:
    raw, labels = random_rows(3, 3000, torch.float32), torch.tensor([5, 2000, 2999])
    raw[:, 10:1500] = -torch.inf
    ours = fused(raw, labels, *setting)
    plain = plain_pytorch(raw, labels, *setting)
    assert_as_accurate(raw, setting, ours, plain, plain_pytorch(raw.double(), labels, *setting))
    assert bool((ours[2][:, 10:1500] == 0).all())
    for got, expected in zip(tiled(raw, labels, *setting), ours, strict=False):
        torch.testing.assert_close(got, expected)  # whole tiles of it are masked


def test_a_label_that_is_masked_has_log_prob_minus_infinity() -> None:
    raw, labels = random_rows(1, 100, torch.float32), torch.tensor([3])
    raw[0, 3] = -torch.inf
    log_probs, lse, gradient = fused(raw, labels)
    assert log_probs[0] == -torch.inf
    assert bool(lse.isfinite().all())
    torch.testing.assert_close(gradient[0, 3].item(), 1.0)
    torch.testing.assert_close(gradient.sum().item(), 0.0, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 7, 1023, 4095, 4999], ids=lambda at: f"column{at}")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_broken_logit_shows_in_its_row_alone(bad: float, column: int, dtype: torch.dtype) -> None:
    raw, labels = random_rows(3, 5000, dtype), torch.tensor([7, 7, 7])
    clean = fused(raw, labels)
    raw[1, column] = bad
    log_probs, lse, gradient = fused(raw, labels)
    assert bool(log_probs[1].isnan())
    assert not bool(lse[1].isfinite())
    assert bool(gradient[1].isnan().any())
    from_tiles = tiled(raw, labels, columns=1000)
    assert bool(from_tiles[0][1].isnan())
    assert not bool(from_tiles[1][1].isfinite())
    for row in (0, 2):
        for got, expected in zip((log_probs, lse, gradient), clean, strict=True):
            assert torch.equal(got[row], expected[row])


def test_strided_rows_give_the_same_bits_and_nothing_beside_them_changes() -> None:
    wide = random_rows(4, 300, torch.float32)
    labels = random_labels(4, 100)
    for view in (wide[:, 50:150], wide[::2, 7:107].expand(2, 100), wide.t()[100:104, :].t().t()):
        rows = len(view)
        columns = view.shape[1]
        label = labels[:rows] % columns
        expected = fused(view.contiguous(), label)
        forward = tiled(view, label, columns=columns)
        canvas = wide.clone()
        target = canvas.as_strided(view.shape, view.stride(), view.storage_offset())
        log_probs, lse = both_(target, label, None, None, 1.0)
        assert torch.equal(log_probs, expected[0])
        torch.testing.assert_close(forward[0], expected[0])
        assert torch.equal(lse, expected[1])
        assert torch.equal(target, expected[2])
        target.zero_()  # and nothing beside the view was written
        untouched = wide.clone()
        untouched.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
        assert torch.equal(canvas, untouched)


@pytest.mark.parametrize("setting", SETTINGS[:2], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_chunks_of_columns_and_of_rows_give_the_same_bits(
    dtype: torch.dtype, setting: tuple[float | None, float]
) -> None:
    """More rows and columns than a tile has, none of them a multiple of a vector."""
    raw, labels = random_rows(1037, 523, dtype), random_labels(1037, 523)
    expected = fused(raw, labels, *setting)
    canvas = torch.full((523, 1040), torch.nan, dtype=dtype)
    chunk = canvas[:, :1037].t().copy_(raw)
    forward = tiled(chunk, labels, *setting, columns=300)
    log_probs, lse = both_(chunk, labels, None, *setting)
    for got, truth in zip((log_probs, lse, chunk), expected, strict=True):
        assert torch.equal(got, truth)
    torch.testing.assert_close(forward[0], log_probs)
    assert bool(canvas[:, 1037:].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_or_written_outside_the_rows(dtype: torch.dtype) -> None:
    canvas = torch.full((3, 140), torch.nan, dtype=dtype)
    canvas[:, :127] = random_rows(3, 127, dtype)
    labels = torch.tensor([0, 60, 126])
    expected = fused(canvas[:, :127].contiguous(), labels)
    log_probs, _ = both_(canvas[:, :127], labels, None, None, 1.0)
    assert torch.equal(log_probs, expected[0])
    assert torch.equal(canvas[:, :127], expected[2])
    assert bool(canvas[:, 127:].isnan().all())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_no_rows_give_empty_results(dtype: torch.dtype) -> None:
    empty, labels = torch.empty(0, 11, dtype=dtype), torch.empty(0, dtype=torch.int64)
    log_probs, lse = both_(empty, labels, None, None, 1.0)
    assert log_probs.shape == lse.shape == (0,)
    assert tiled(empty, labels)[0].shape == (0,)


def test_the_same_bits_for_any_number_of_threads() -> None:
    raw, labels = random_rows(521, 5003, torch.float32), random_labels(521, 5003)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = fused(raw, labels)
        torch.set_num_threads(2)
        runs = [fused(raw, labels), fused(raw, labels)]
    finally:
        torch.set_num_threads(before)
    for run in runs:
        for got, expected in zip(run, alone, strict=True):
            assert torch.equal(got, expected)


def test_poisoned_memory_does_not_reach_the_outputs() -> None:
    """With deterministic fill on, every uninitialised buffer starts as NaN."""
    raw, labels = random_rows(5, 1000, torch.float32), random_labels(5, 1000)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        results = fused(raw, labels)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bool(one.isfinite().all()) for one in results)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    with pytest.raises(RuntimeError, match=r"labels\[1\] = -?\d+ is outside the vocabulary"):
        OPS.row_log_probs(torch.zeros(2, 10), torch.tensor([0, label]), None, None, 1.0)


def test_integer_logits_are_refused() -> None:
    raw, labels, of_rows = torch.zeros(2, 10).int(), torch.tensor([0, 1]), torch.zeros(2)
    with pytest.raises(RuntimeError, match="row_log_probs: logits must be float32"):
        OPS.row_log_probs(raw, labels, None, None, 1.0)
    with pytest.raises(RuntimeError, match="row_gradient_: logits must be float32"):
        OPS.row_gradient_(raw, labels, *[of_rows] * 4, None, 1.0)


@pytest.mark.parametrize("dtype", slow_but([torch.float32], [*DTYPES, torch.float64]), ids=str)
def test_the_operators_keep_the_rules_of_torch_library(dtype: torch.dtype) -> None:
    raw, labels = random_rows(3, 17, dtype), random_labels(3, 17)
    target = torch.randn(3, dtype=torch.promote_types(dtype, torch.float32))
    for arguments in ((raw, labels, None, None, 1.0), (raw, labels, target, 30.0, 0.5)):
        torch.library.opcheck(OPS.row_log_probs.default, arguments)
    log_probs, _, shift, share = OPS.row_log_probs(raw, labels, None, 30.0, 0.5)
    of_rows = log_probs, shift, share, torch.randn_like(log_probs)
    torch.library.opcheck(OPS.row_gradient_.default, (raw, labels, *of_rows, 30.0, 0.5))
    others, z = torch.zeros(2, 3, dtype=torch.float64)
    torch.library.opcheck(OPS.tile_log_probs_.default, (raw, labels, 30.0, 0.5, others, z))


def test_the_library_serves_the_cpu_and_the_reference_everything_else() -> None:
    for op in ("row_log_probs", "row_gradient_", "tile_log_probs_", "row_kl_"):
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has(f"npo_fast::{op}", "CPU")
        assert has(f"npo_fast::{op}", "CompositeExplicitAutograd")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_tiles_agree_with_the_reference(
    dtype: torch.dtype, setting: tuple[float | None, float]
) -> None:
    raw, labels = random_rows(6, 300, dtype), torch.tensor([-1, 0, 150, 299, 300, 7])
    state = [torch.full((6,), -2.0, dtype=torch.float64) for _ in range(4)]
    OPS.tile_log_probs_(raw, labels, *setting, *state[:2])
    REFERENCE.tile_log_probs_(raw, labels, *setting, *state[2:])
    for ours, theirs in zip(state[:2], state[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert state[1][0] == state[1][4] == -2.0  # their label is in no column here


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_passes_these_tests(capability: str) -> None:
    """In a child process each, as the choice is made once."""
    supported = getattr(torch.cpu, f"_is_{capability}_supported", lambda: capability == "default")
    if not supported():
        pytest.skip(f"this processor has no {capability}")
    folder = Path(__file__).parent
    tests = [str(folder / "test_kernels_cpu.py"), str(folder / "test_kernels_linear.py")]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-1000:]
    assert " passed" in child.stdout


def test_a_library_that_does_not_load_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "_cpu.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "library_path", lambda: broken)
    with pytest.raises(ImportError, match=r"_cpu\.abi3\.so do not load .* Rebuild them"):
        cpu.load()


def test_an_absent_library_leaves_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library_path", lambda: None)
    cpu.load()


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What ``kernels.cpu`` warns of, as in a new process."""
    warnings: list[str] = []
    monkeypatch.setattr(cpu.logger, "warning", warnings.append)
    cpu.tell_if_absent.cache_clear()
    yield warnings
    cpu.tell_if_absent.cache_clear()


def test_the_first_call_without_a_library_says_so_once_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    monkeypatch.setattr(cpu, "library_path", lambda: None)
    tensors = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4])
    assert not messages, "to load is no use"
    for _ in range(2):
        linear_log_probs(*tensors)
        linear_kl(*tensors[:2], *tensors[:2])
    (message,) = messages
    assert "C++ kernels are not built" in message
    assert "install a C++ compiler" in message
    assert "\n" not in message


def test_a_library_is_not_worth_a_line(messages: list[str]) -> None:
    linear_log_probs(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4]))
    assert not messages
