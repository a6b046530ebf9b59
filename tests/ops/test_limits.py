"""Sizes of 0, infinite logits, extreme settings: the right limit, or an error that names them."""

import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from npo_fast import (
    CEU,
    DPO,
    GA,
    KTO,
    NLL,
    NPO,
    TNPO,
    WGA,
    FusedLinearKLLoss,
    FusedLinearNLLLoss,
    SatImp,
    SimNPO,
    UserError,
    linear_kl,
    linear_log_probs,
    linear_sequence_loss,
    sequence_log_probs,
)
from npo_fast.kernels import layout
from npo_fast.losses import KL, Averaged
from npo_fast.ops.head import Head
from npo_fast.ops.target_entropy import entropy_without_labels
from npo_fast.ops.vocab_parallel import VocabularySlice
from tests.helpers import slow_but

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
INF = math.inf
# beyond the range, not a number, without a meaning
SENSELESS = (INF, -INF, math.nan, 1e39, 1e-39, 0.0, 5e-324)
WAYS = ({}, {"chunk_rows": 0}, {"chunk_rows": 2}, {"reduction": "none"}, {"skip_below": 1e-9})


@pytest.fixture(params=[True, False], ids=["CPU", "GPU"])
def _policy(request, monkeypatch):
    """The layouts and dtypes of a CPU, and those of a GPU with the reference kernels."""
    if not request.param:
        monkeypatch.setattr(layout, "runs_on_cpu", lambda tensor: False)


def case(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and bias, whose values fp16 has too."""
    shapes = (n, d), (v, d), (v,)
    hidden, weight, bias = (torch.randn(*s).half().to(dtype).requires_grad_() for s in shapes)
    return hidden, weight, bias


def plain_log_probs(h: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    logits = h.double() @ w.double().t() + b.double()
    return logits.log_softmax(-1).gather(1, y.unsqueeze(1)).squeeze(1)


# --- sizes ----------------------------------------------------------------------------------------

CALLS: dict[str, Callable[..., Tensor]] = {
    "log_probs": lambda h, w, b, y, cu: linear_log_probs(h, w, y, bias=b),
    "no logits": lambda h, w, b, y, cu: linear_log_probs(h, w, y, bias=b, chunk_rows=0),
    "chunks": lambda h, w, b, y, cu: linear_log_probs(h, w, y, bias=b, chunk_rows=2),
    **{f"loss {i}": lambda h, w, b, y, cu, way=way: (
        linear_sequence_loss(h, w, y, cu, NLL(), bias=b, **{"reduction": "sum"} | way)[0]
    ) for i, way in enumerate(WAYS)},
    "sequence_log_probs": lambda h, w, b, y, cu: (
        sequence_log_probs(h, w, y, cu_seqlens=cu, shifted=True, bias=b)
    ),
    "module": lambda h, w, b, y, cu: FusedLinearNLLLoss(reduction="sum")(w, h, y, b, cu_seqlens=cu),
    "kl": lambda h, w, b, y, cu: linear_kl(
        h, w, h.detach(), w.detach(), bias=b, ref_bias=b.detach(), labels=y, demotion=0.5
    ),
    "kl rows": lambda h, w, b, y, cu: linear_kl(
        h, w, h.detach(), w.detach(), bias=b, ref_bias=b.detach(), reduction="none"
    ),
    "kl module": lambda h, w, b, y, cu: FusedLinearKLLoss()(w, h, y, b, h.detach(), w.detach()),
}  # fmt: skip


@pytest.mark.usefixtures("_policy")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], DTYPES), ids=str)
def test_sizes_of_zero_give_the_sum_over_nothing(name: str, dtype: torch.dtype) -> None:
    for n, d, v, s in itertools.product((0, 1, 5), (0, 3), (1, 7), (0, 1, 3)):
        if n and not s:
            continue
        hidden, weight, bias = case(n, d, v, dtype)
        labels = torch.randint(v, (n,))
        cu_seqlens = torch.tensor([0, *[n] * s])
        value = CALLS[name](hidden, weight, bias, labels, cu_seqlens)
        gradients = torch.autograd.grad(value.sum(), (hidden, weight, bias))
        assert all(bool(x.isfinite().all()) for x in (value, *gradients)), (n, d, v, s)
        if "kl" not in name:
            truth = plain_log_probs(hidden, weight, labels, bias).sum()
            sign = -1 if "loss" in name or name == "module" else 1
            error = (value.double().sum() - sign * truth).abs()
            assert error <= TOLERANCE[dtype] * (1 + truth.abs()), (n, d, v, s)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("n", [0, 2])
def test_a_vocabulary_of_no_tokens_is_refused(name: str, n: int) -> None:
    hidden, weight, bias = case(n, 3, 0, torch.float32)
    with pytest.raises(UserError, match=r"vocabulary"):
        CALLS[name](hidden, weight, bias, torch.zeros(n, dtype=torch.long), torch.tensor([0, n]))


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [*SENSELESS, -1.0], ids=str)
def test_a_softcap_or_scale_without_a_meaning_is_refused(value: float) -> None:
    hidden, weight, _ = case(2, 3, 5, torch.float32)
    labels, got = torch.tensor([0, 1]), re.escape(str(value))
    for setting in ("softcap", "logit_scale"):
        if (setting, value) == ("logit_scale", -1.0):
            continue
        with pytest.raises(UserError, match=rf"linear_log_probs: {setting} must .*, got {got}"):
            linear_log_probs(hidden, weight, labels, **{setting: value})
        with pytest.raises(UserError, match=rf"linear_kl: ref_{setting} must .*, got {got}"):
            linear_kl(hidden, weight, hidden, weight, **{f"ref_{setting}": value})


@pytest.mark.parametrize("dtype", slow_but([torch.float32], DTYPES), ids=str)
@pytest.mark.parametrize(
    "setting", [{"softcap": 1e30}, {"softcap": 1e-30}, {"logit_scale": 1e-30}], ids=str
)
def test_the_ends_of_the_range_give_the_limits(dtype: torch.dtype, setting: dict) -> None:
    hidden, weight, bias = case(4, 3, 7, dtype)
    labels = torch.tensor([0, 6, 3, 3])
    got = linear_log_probs(hidden, weight, labels, bias=bias, **setting)
    uncapped = plain_log_probs(hidden, weight, labels, bias)
    uniform = torch.full_like(uncapped, -math.log(7))
    expected = uncapped if setting == {"softcap": 1e30} else uniform
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=20 * TOLERANCE[dtype])
    for x in torch.autograd.grad(got.sum(), (hidden, weight, bias)):
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("value", [INF, -INF, math.nan, 1e39, -1e39], ids=str)
@pytest.mark.parametrize(
    "make",
    [NPO, DPO, KTO, SimNPO, TNPO, WGA, lambda x: KTO(z=x), lambda x: SimNPO(delta=x), SatImp,
     lambda x: SatImp(1.0, x), lambda x: TNPO(epsilon=x), lambda x: KL(demotion=x)],
)  # fmt: skip
def test_a_coefficient_without_a_meaning_is_refused(make: Callable, value: float) -> None:
    with pytest.raises(
        UserError, match=r"(beta|beta1|beta2|z|delta|epsilon|demotion).* must be .*"
    ):
        make(value)


@pytest.mark.parametrize("beta", [1e-39, 5e-324, 0.0])
def test_a_beta_whose_inverse_overflows_is_refused(beta: float) -> None:
    for loss in (NPO, DPO, KTO, SimNPO, TNPO, WGA):
        with pytest.raises(UserError, match=f"{loss.__name__}: beta must be positive and finite"):
            loss(beta)


@pytest.mark.parametrize("beta", [1e-30, 1e30])
def test_the_ends_of_betas_range_have_values_and_gradients(beta: float) -> None:
    hidden, weight, bias = case(4, 3, 7, torch.float32)
    labels, cu_seqlens = torch.tensor([0, 6, 3, 3]), torch.tensor([0, 2, 4])
    for loss in (NPO(beta), DPO(beta), KTO(beta), SimNPO(beta), WGA(beta)):
        value, _ = linear_sequence_loss(
            hidden,
            weight,
            labels,
            cu_seqlens,
            loss,
            bias=bias,
            ref_log_probs=torch.tensor([-9, -1]),
        )
        for x in (value, *torch.autograd.grad(value, (hidden, weight, bias))):
            assert bool(x.isfinite().all()), loss


# --- labels without probability -------------------------------------------------------------------

LABELS = torch.tensor([3, 0, 8, 2, 1, 5])
CU_SEQLENS = torch.tensor([0, 2, 6])
PER_TOKEN = {
    "WGA": (WGA(), None, lambda p: p * p.log()),
    "SatImp": (SatImp(1.5, 0.5), None, lambda p: p**1.5 * (1 - p) ** 0.5 * p.log()),
    "CEU": (CEU(), None, lambda p: -torch.log1p(-p)),
    "TNPO": (TNPO(0.7), -1.0, lambda p: 2 * p**0.7 / (p**0.7 + math.exp(-0.7)) * p.log()),
    "TNPO of none": (TNPO(0.7), -INF, lambda p: 2 * p.log()),
    "TNPO, epsilon": (TNPO(0.7, 0.1), -INF, lambda p: 2 * p**0.7 / (p**0.7 + 0.1) * p.log()),
}


def masked_case(dtype: torch.dtype, masked: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = case(6, 4, 9, dtype)
    with torch.no_grad():
        bias[masked] = -INF
    return hidden, weight, bias


def run(loss: object, tensors: tuple, labels: Tensor, cu_seqlens: Tensor, ref: Tensor | None,
        way: dict) -> list[Tensor]:  # fmt: skip
    value = linear_sequence_loss(
        *tensors[:2], labels, cu_seqlens, loss, bias=tensors[2], ref_log_probs=ref,
        **{"reduction": "sum"} | way,
    )[0].sum()  # fmt: skip
    return [value.detach(), *torch.autograd.grad(value, tensors)]


@pytest.mark.usefixtures("_policy")
@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.bfloat16], DTYPES), ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_token_without_probability_has_no_weight(
    name: str, way: dict, dtype: torch.dtype
) -> None:
    """The value is the limit for p -> 0, and the gradient that of the other tokens."""
    loss, ref, formula = PER_TOKEN[name]
    tensors = masked_case(dtype, masked=int(LABELS[3]))
    refs = None if ref is None else torch.full((6,), ref)
    got = run(loss, tensors, LABELS, CU_SEQLENS, refs, way)
    p = plain_log_probs(tensors[0], tensors[1], LABELS, tensors[2]).exp().detach()
    expected = formula(p[p > 0]).sum()
    torch.testing.assert_close(got[0].double(), expected, rtol=10 * TOLERANCE[dtype], atol=0)
    rest = torch.tensor([0, 1, 2, 4, 5])
    hidden = tensors[0].detach()[rest].requires_grad_()
    without = run(loss, (hidden, *tensors[1:]), LABELS[rest], torch.tensor([0, 2, 5]),
                  None if refs is None else refs[rest], way)  # fmt: skip
    assert bool((got[1][3] == 0).all())
    for one, other in zip((got[1][rest], *got[2:]), without[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.usefixtures("_policy")
@pytest.mark.parametrize("dtype", slow_but([torch.float32], DTYPES), ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("loss", [NPO(), KTO(), SimNPO(), Averaged(NPO())], ids=repr)
def test_a_sequence_without_probability_is_forgotten(
    loss: object, way: dict, dtype: torch.dtype
) -> None:
    tensors = masked_case(dtype, masked=int(LABELS[3]))
    ref = torch.tensor([-5.0, -9.0])
    got = run(loss, tensors, LABELS, CU_SEQLENS, ref, way)
    hidden = tensors[0].detach()[:2].requires_grad_()
    alone = run(loss, (hidden, *tensors[1:]), LABELS[:2], CU_SEQLENS[:2], ref[:1], way)
    constant = 1.0 if isinstance(loss, KTO) else 0.0
    torch.testing.assert_close(got[0], alone[0] + constant, rtol=TOLERANCE[dtype], atol=1e-6)
    assert bool((got[1][2:] == 0).all())
    for one, other in zip((got[1][:2], *got[2:]), alone[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_losses_that_ask_for_a_label_without_probability_are_infinite(way: dict) -> None:
    """As in plain PyTorch; the gradient in the logits, onehot - p, is finite all the same."""
    tensors = masked_case(torch.float32, masked=int(LABELS[0]))
    for loss, value in ((NLL(), INF), (GA(), -INF), (DPO(), INF), (SatImp(0.0, 1.0), -INF)):
        found = run(loss, tensors, LABELS, CU_SEQLENS, torch.tensor([-5.0, -9.0]), way)
        assert float(found[0]) == value
        assert all(bool(x.isfinite().all()) for x in found[1:]), loss


@pytest.mark.parametrize("value", [INF, -INF, math.nan])
def test_a_reference_that_is_no_number_is_refused_by_its_index(value: float) -> None:
    tensors = case(6, 4, 9, torch.float32)
    for loss in (NPO(), DPO(), KTO(), Averaged(NPO())):
        for way in WAYS:
            with pytest.raises(UserError, match=r"ref_log_probs\[1\] = .* drop the sequence"):
                run(loss, tensors, LABELS, CU_SEQLENS, torch.tensor([-5.0, value]), way)
    of_tokens = torch.tensor([0.0, value, 0, 0, 0, 0])
    if value != -INF:  # a token that the reference excludes has a limit
        with pytest.raises(UserError, match=r"ref_log_probs\[1\] = .* drop the token"):
            run(TNPO(), tensors, LABELS, CU_SEQLENS, of_tokens, {})


@pytest.mark.usefixtures("_policy")
@pytest.mark.parametrize("dtype", slow_but([torch.float32], DTYPES), ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_kl_with_masked_tokens_has_its_limits(reduction: str, dtype: torch.dtype) -> None:
    """0 * log 0 = 0 where both mask a token; infinite where the model alone does."""
    hidden, weight, bias = masked_case(dtype, masked=2)
    other, ref_bias = hidden.detach().flip(0), bias.detach().clone()
    ref_bias[7] = -INF  # the reference alone: no term

    def both(ref_bias: Tensor, demotion: float) -> tuple[Tensor, Tensor]:
        got = linear_kl(
            hidden, weight, other, weight, bias=bias, ref_bias=ref_bias, reduction=reduction,
            labels=LABELS, demotion=demotion,
        ).sum()  # fmt: skip
        z, ref_z = (
            h.double() @ weight.double().t() + b.double()
            for h, b in ((hidden, bias), (other, ref_bias))
        )
        ref_z = ref_z.scatter_add(1, LABELS[:, None], torch.full((6, 1), -demotion).double())
        log_p, log_ref = z.log_softmax(-1), ref_z.log_softmax(-1)
        terms = log_ref.exp() * (log_ref - log_p)
        return got, torch.where(log_ref == -INF, 0.0, terms).sum()

    for demotion in (0.0, 2.0):
        got, want = both(ref_bias, demotion)
        torch.testing.assert_close(got.double(), want, rtol=10 * TOLERANCE[dtype], atol=0)
        for x in torch.autograd.grad(got, (hidden, weight, bias)):
            assert bool(x.isfinite().all())
    got, want = both(torch.zeros_like(bias), 0.0)
    assert float(got) == float(want) == INF
    for x in torch.autograd.grad(got, (hidden, weight, bias)):
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_entropy_of_a_target_with_masked_tokens_has_its_limit(dtype: torch.dtype) -> None:
    hidden, weight, bias = (x.detach() for x in masked_case(dtype, masked=2))
    z = hidden.double() @ weight.double().t() + bias.double()
    log_q = z.scatter(1, LABELS[:, None], -INF).log_softmax(-1)
    expected = -torch.where(log_q == -INF, 0.0, log_q.exp() * log_q).sum(-1)
    got = entropy_without_labels(Head(weight, bias), hidden, LABELS)
    torch.testing.assert_close(got.double(), expected, rtol=10 * TOLERANCE[dtype], atol=0)
    alone = entropy_without_labels(Head(weight[:1]), hidden, torch.zeros(6, dtype=torch.long))
    assert bool((alone == 0).all()), "no token is left beside the label"


@pytest.mark.parametrize("way", [{}, {"chunk_rows": 2}, {"skip_below": 1e-9}], ids=str)
def test_a_sliced_vocabulary_has_the_same_limits(way: dict) -> None:
    tensors = masked_case(torch.float32, masked=int(LABELS[3]))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sliced = {**way, "vocabulary": VocabularySlice(dist.group.WORLD, 9)}
        for loss in (WGA(), NPO(), NLL()):
            whole, parts = (
                run(loss, tensors, LABELS, CU_SEQLENS, torch.tensor([-5.0, -9.0]), one)
                for one in (way, sliced)
            )
            for got, want in zip(parts, whole, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()


# --- everything at once ---------------------------------------------------------------------------


@pytest.mark.usefixtures("_policy")
@pytest.mark.parametrize("seed", slow_but(range(20), range(200)))
def test_random_sizes_and_special_values_agree_with_fp64(seed: int) -> None:
    """NaN where plain PyTorch has NaN, -inf where it has -inf, its numbers elsewhere."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    n, d, v = number(0, 40), number(0, 9), number(1, 60)
    dtype = DTYPES[number(0, 3)]
    hidden, weight, bias = (
        torch.randn(*s, generator=generator).half().to(dtype) for s in ((n, d), (v, d), (v,))
    )
    labels = torch.randint(v, (n,), generator=generator)
    for _ in range(number(0, 3)):
        bias[number(0, v - 1)] = -INF
    if n and d and number(0, 2) == 0:
        hidden[number(0, n - 1), number(0, d - 1)] = (math.nan, INF, -INF)[number(0, 2)]
    for x in (hidden, weight, bias):
        x.requires_grad_()
    chunk_rows = (None, 0, 1, 7)[number(0, 3)]
    got = linear_log_probs(hidden, weight, labels, bias=bias, chunk_rows=chunk_rows)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    want = plain_log_probs(exact[0], exact[1], labels, exact[2])
    tolerance = {"rtol": 0.0, "atol": 30 * TOLERANCE[dtype], "equal_nan": True}
    torch.testing.assert_close(got.detach().double(), want.detach(), **tolerance)
    rows = want.isfinite()
    if bool((rows | (want == -INF)).all()):
        found = torch.autograd.grad(got.sum(), (hidden, weight, bias))
        truth = torch.autograd.grad(want.sum(), exact)
        for one, other in zip(found, truth, strict=True):
            bound = 30 * TOLERANCE[dtype] * (1 + float(other.abs().max() if other.numel() else 0))
            torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)
