"""bf16 where a CPU has instructions for it, and fp16 under a loss scale."""

import pytest
import torch
from torch import Tensor

from npo_fast import (
    NLL,
    NPO,
    linear_kl,
    linear_log_probs,
    linear_sequence_loss,
    segment_sum,
)
from npo_fast.kernels import layout
from npo_fast.ops import head
from tests.helpers import assert_as_exact, slow_but

WIDTH, VOCABULARY = 64, 517
AMX, AVX512_BF16 = "_is_amx_tile_supported", "_is_avx512_bf16_supported"


# --- bf16 on a CPU --------------------------------------------------------------------------------


@pytest.mark.parametrize("instructions", [(), (AMX,), (AVX512_BF16,), (AMX, AVX512_BF16)])
@pytest.mark.parametrize(("wish", "granted"), [("", None), ("0", False), ("1", True)])
def test_the_environment_decides_and_else_the_processor(monkeypatch, instructions, wish, granted):
    for name in (AMX, AVX512_BF16):
        monkeypatch.setattr(torch.cpu, name, lambda has=name in instructions: has)
    monkeypatch.setenv("NPO_FAST_CPU_BF16", wish)
    expected = AMX in instructions if granted is None else granted
    assert layout.cpu_multiplies_bf16() == expected
    products = {
        dtype: layout.product_dtype(torch.empty(1, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    }
    assert products == {
        torch.bfloat16: torch.bfloat16 if expected else torch.float32,
        torch.float16: torch.float32,  # no CPU is known to be fast at it
        torch.float32: torch.float32,
        torch.float64: torch.float64,
    }


def test_a_pytorch_that_cannot_say_multiplies_in_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, AMX, raising=False)
    monkeypatch.delenv("NPO_FAST_CPU_BF16", raising=False)
    assert not layout.cpu_multiplies_bf16()


def bf16_case(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (rows, WIDTH), "weight": (VOCABULARY, WIDTH), "bias": (VOCABULARY,)}
    return {
        name: (torch.randn(*shape, generator=generator) * (0.4 if name == "weight" else 1))
        .bfloat16()
        .requires_grad_()
        for name, shape in shapes.items()
    }


def plain_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().double().requires_grad_() for name, t in tensors.items()}


def gradients(value: Tensor, tensors: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(tensors.values())))


@pytest.mark.parametrize(
    ("rows", "chunk_rows"),
    [
        *((rows, None) for rows in (40, 120)),
        pytest.param(64, None, marks=pytest.mark.slow),
        pytest.param(40, 0, marks=pytest.mark.slow),
    ],
)
def test_bf16_products_cost_no_accuracy_beside_plain_pytorch(rows, chunk_rows, monkeypatch):
    """Over draws. The log-probs are better: the label's logit is not rounded."""
    monkeypatch.setattr(layout, "cpu_multiplies_bf16", lambda: True)
    bounds, ref = torch.tensor([0, 7, rows]), torch.tensor([-30.0, -300.0])
    squares: dict[str, Tensor] = {}
    for seed in range(8):
        tensors = bf16_case(rows, seed)
        labels = torch.randint(VOCABULARY, (rows,))
        of = {
            "ours": linear_sequence_loss(
                labels=labels, cu_seqlens=bounds, loss=NPO(0.1), ref_log_probs=ref,
                chunk_rows=chunk_rows, **tensors,
            )[0],
            "plain": NPO(0.1)(plain_log_probs(labels=labels, **tensors), bounds, ref).mean(),
        }  # fmt: skip
        leaves = wide(tensors)
        log_probs = plain_log_probs(labels=labels, **leaves)
        exact = gradients(NPO(0.1)(log_probs, bounds, ref.double()).mean(), leaves)
        errors = {
            who: [
                float((got.double() - want).norm() ** 2)
                for got, want in zip(gradients(value, tensors), exact, strict=True)
            ]
            for who, value in of.items()
        }
        alone = linear_log_probs(labels=labels, chunk_rows=chunk_rows, **tensors)
        _, of_loss = linear_sequence_loss(  # of sequences of one token each
            labels=labels, cu_seqlens=torch.arange(rows + 1), loss=NLL(), chunk_rows=chunk_rows,
            **tensors,
        )  # fmt: skip
        plain = plain_log_probs(labels=labels, **tensors)
        for who, found in (("ours", [alone, of_loss]), ("plain", [plain, plain])):
            errors[who] += [float((one.double() - log_probs).detach().norm() ** 2) for one in found]
            squares[who] = squares.get(who, 0) + torch.tensor(errors[who])
    names = [*tensors, "log_probs", "log_probs of the loss"]
    ratios = dict(zip(names, (squares["ours"] / squares["plain"]).sqrt(), strict=True))
    assert all(ratios.pop(name) < 0.9 for name in names[-2:])
    assert all(ratio <= 1.05 for ratio in ratios.values()), ratios


def test_bf16_logits_are_kept_in_bf16_and_in_the_memory_of_the_gradient(monkeypatch):
    monkeypatch.setattr(layout, "cpu_multiplies_bf16", lambda: True)
    seen: list[tuple[torch.dtype, int]] = []
    original = Tensor.new_empty

    def watch(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        seen.append((out.dtype, out.numel()))
        return out

    monkeypatch.setattr(Tensor, "new_empty", watch)
    tensors = bf16_case(40, 0)
    labels, bounds = torch.randint(VOCABULARY, (40,)), torch.tensor([0, 40])
    linear_sequence_loss(labels=labels, cu_seqlens=bounds, loss=NLL(), **tensors)[0].backward()
    large = [(dtype, n) for dtype, n in seen if n >= 40 * VOCABULARY]
    assert [dtype for dtype, _ in large] == [torch.bfloat16]
    assert WIDTH * VOCABULARY < large[0][1] <= WIDTH * VOCABULARY * 9 / 8


def test_without_bf16_products_all_is_computed_in_fp32_and_rounded_once(monkeypatch):
    monkeypatch.setattr(layout, "cpu_multiplies_bf16", lambda: False)
    half = bf16_case(50, 0)
    single = {name: t.detach().float().requires_grad_() for name, t in half.items()}
    labels, bounds = torch.randint(VOCABULARY, (50,)), torch.tensor([0, 20, 50])
    ref = torch.tensor([-100.0, -150.0])
    found, expected = (
        linear_sequence_loss(
            labels=labels, cu_seqlens=bounds, loss=NPO(0.1), ref_log_probs=ref, **tensors
        )
        for tensors in (half, single)
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for got, want in zip(gradients(found[0], half), gradients(expected[0], single), strict=True):
        assert torch.equal(got, want.bfloat16())


def test_a_weight_that_is_converted_slice_by_slice_adds_up_to_the_same(monkeypatch):
    monkeypatch.setattr(layout, "cpu_multiplies_bf16", lambda: False)
    tensors = bf16_case(50, 0)
    arguments = {
        "labels": torch.randint(VOCABULARY, (50,)), "cu_seqlens": torch.tensor([0, 20, 50]),
        "loss": NLL(), **tensors,
    }  # fmt: skip
    runs = []
    for rows in (VOCABULARY, 100):  # of the weight at a time; the last 17 are a slice of their own
        monkeypatch.setattr(head, "UPCAST_BYTES", rows * WIDTH * 4)
        value, _ = linear_sequence_loss(**arguments)
        runs.append([value, *gradients(value, tensors)])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)


# --- fp16 under a loss scale ----------------------------------------------------------------------

SCALE = 65536.0  # what a GradScaler begins with
POLICIES = {"CPU": True, "GPU": False}


@pytest.fixture(params=POLICIES.values(), ids=POLICIES)
def _policy(request, monkeypatch):
    """fp16 is multiplied in fp32 on a CPU, and as it is on a GPU."""
    if not request.param:
        monkeypatch.setattr(layout, "runs_on_cpu", lambda tensor: False)


def fp16_case(rows: int, width: int = 16, vocabulary: int = 64) -> dict[str, Tensor]:
    return {
        "hidden": torch.randn(rows, width).half().requires_grad_(),
        "weight": (0.5 * torch.randn(vocabulary, width)).half().requires_grad_(),
    }


@pytest.mark.usefixtures("_policy")
@pytest.mark.parametrize("reduction", slow_but(["token_mean"], ["mean", "token_mean"]))
@pytest.mark.parametrize("chunk_rows", slow_but([None], [None, 5000, 0]))
def test_gradients_of_a_mean_over_many_tokens_do_not_underflow(chunk_rows, reduction):
    """They are formed before the loss scale is known: at scale 1 most would be 0 in fp16."""
    rows = 32_768
    tensors, labels = fp16_case(rows), torch.randint(64, (rows,))
    bounds = torch.arange(0, rows + 1, 4)
    ref = torch.full((len(bounds) - 1,), -25.0)
    arguments = {
        "labels": labels, "cu_seqlens": bounds, "loss": NPO(0.1), "ref_log_probs": ref,
        "reduction": reduction, "chunk_rows": chunk_rows,
    }  # fmt: skip
    value, _ = linear_sequence_loss(**arguments, **tensors)
    ours = gradients(SCALE * value, tensors)

    def by_pytorch(leaves):
        log_probs = plain_log_probs(labels=labels, **leaves)
        values = NPO(0.1)(log_probs, bounds, ref.to(log_probs))
        count = rows if reduction == "token_mean" else len(values)
        return gradients(SCALE * values.sum() / count, leaves)

    plain, exact = by_pytorch(tensors), by_pytorch(wide(tensors))
    for got, other, want, name in zip(ours, plain, exact, tensors, strict=True):
        assert got.dtype == torch.float16
        assert bool(got.isfinite().all())
        assert_as_exact(got, other, want, name)


@pytest.mark.slow
@pytest.mark.usefixtures("_policy")
def test_gradients_of_kl_over_many_tokens_do_not_underflow():
    rows = 32_768
    tensors, ref = fp16_case(rows), {f"ref_{k}": t.detach() for k, t in fp16_case(rows).items()}
    ours = gradients(SCALE * linear_kl(**tensors, **ref), tensors)

    def by_pytorch(leaves):
        dtype = torch.promote_types(leaves["hidden"].dtype, torch.float32)
        log_p = (leaves["hidden"] @ leaves["weight"].t()).to(dtype).log_softmax(-1)
        hidden, weight = (one.to(leaves["hidden"].dtype) for one in ref.values())
        log_ref = (hidden @ weight.t()).to(dtype).log_softmax(-1)
        return gradients(SCALE * (log_ref.exp() * (log_ref - log_p)).sum() / rows, leaves)

    plain, exact = by_pytorch(tensors), by_pytorch(wide(tensors))
    for got, other, want, name in zip(ours, plain, exact, tensors, strict=True):
        assert_as_exact(got, other, want, name)


@pytest.mark.usefixtures("_policy")
@pytest.mark.parametrize("way", [{}, {"chunk_rows": 100}, {"chunk_rows": 0}, {"skip_below": 1e-9}])
@pytest.mark.parametrize("forgotten_by", [0, 100, 150, 200, "some more than others"])
def test_gradients_of_forgotten_sequences_do_not_underflow(forgotten_by, way):
    """NPO at beta 0.1 weighs a sequence that lost 200 nats 2e-9; a GradScaler multiplies later."""
    rows = 512
    tensors, labels = fp16_case(rows), torch.randint(64, (rows,))
    bounds = torch.arange(0, rows + 1, 16)
    exact = wide(tensors)
    log_probs = segment_sum(plain_log_probs(labels=labels, **exact), bounds).detach()
    some = torch.linspace(200, 0, len(log_probs))  # each chunk has larger gradients than the last
    ref = (log_probs + (some if isinstance(forgotten_by, str) else forgotten_by)).float()

    def by_pytorch(leaves):
        values = NPO(0.1)(plain_log_probs(labels=labels, **leaves), bounds, ref)
        return gradients(SCALE * values.mean(), leaves)

    value, _ = linear_sequence_loss(
        labels=labels, cu_seqlens=bounds, loss=NPO(0.1), ref_log_probs=ref, **way, **tensors
    )
    ours, plain, truth = gradients(SCALE * value, tensors), by_pytorch(tensors), by_pytorch(exact)
    for got, other, want in zip(ours, plain, truth, strict=True):
        assert got.dtype == torch.float16
        error, allowed = (float((one.double() - want).norm() / want.norm()) for one in (got, other))
        assert error <= max(2 * allowed, torch.finfo(torch.float16).eps)


@pytest.mark.usefixtures("_policy")
@pytest.mark.parametrize("forgotten_by", [0, 150])
def test_sums_over_many_tokens_of_large_hidden_states_do_not_overflow(forgotten_by):
    """The sum is 65000 before an upstream of 1/rows; the largest number of fp16 is 65504."""
    rows = 4096
    hidden = torch.full((rows, 4), 64.0).half().requires_grad_()
    weight = torch.zeros(8, 4).half().requires_grad_()
    labels, bounds = torch.zeros(rows, dtype=torch.long), torch.arange(rows + 1)
    ref = torch.full((rows,), -2.08 + forgotten_by)
    for reduction in ("sum", "mean"):
        value, _ = linear_sequence_loss(
            hidden, weight, labels, bounds, NPO(0.1), ref_log_probs=ref, reduction=reduction
        )
        upstream = 1 / rows if reduction == "sum" else 1.0
        _, gradient = torch.autograd.grad(upstream * SCALE * value / 1024, (hidden, weight))
        g = float(2 * torch.sigmoid(torch.tensor(-0.1 * forgotten_by, dtype=torch.float64)))
        expected = (torch.arange(8) == 0).double().sub(1 / 8).unsqueeze(1) * g * 64 * SCALE / 1024
        torch.testing.assert_close(gradient.double(), expected.expand(8, 4), rtol=5e-3, atol=0)


@pytest.mark.usefixtures("_policy")
def test_gradients_that_overflow_are_infinite_so_that_a_scaler_skips_the_step():
    tensors, labels = fp16_case(64), torch.randint(64, (64,))
    value, _ = linear_sequence_loss(
        labels=labels, cu_seqlens=torch.tensor([0, 64]), loss=NLL(), **tensors
    )
    for gradient in gradients(1e9 * value, tensors):
        assert not bool(gradient.isfinite().all())


def test_a_unit_is_the_power_of_two_below():
    for number, expected in ((1.0, 1), (1.99, 1), (2.0, 2), (3e4, 16384), (2.0**-90, 2.0**-90)):
        assert float(layout.power_of_two(torch.tensor(number))) == expected
    assert 0 < float(layout.power_of_two(torch.tensor(0.0))) <= 1e-30
    assert float(layout.power_of_two(torch.tensor(torch.inf))) == torch.inf
    assert bool(layout.power_of_two(torch.tensor(torch.nan)).isnan())


@pytest.mark.usefixtures("_policy")
def test_a_second_backward_in_fp16_gives_the_same_gradients():
    tensors, labels = fp16_case(600), torch.randint(64, (600,))
    ref = {f"ref_{name}": t.detach() for name, t in fp16_case(600).items()}
    value, _ = linear_sequence_loss(
        labels=labels, cu_seqlens=torch.tensor([0, 200, 600]), loss=NLL(),
        reduction="token_mean", **tensors,
    )  # fmt: skip
    for one in (value, linear_kl(**tensors, **ref)):
        leaves = list(tensors.values())
        first = torch.autograd.grad(1024 * one, leaves, retain_graph=True)
        second = torch.autograd.grad(4096 * one, leaves)
        for got, want in zip(second, first, strict=True):
            assert float(want.abs().max()) > 1e-2
            torch.testing.assert_close(got.float(), 4 * want.float(), rtol=2e-3, atol=1e-6)
