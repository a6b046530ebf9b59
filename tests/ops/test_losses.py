"""Signs, limits and weights of the losses, and each beside plain PyTorch on the logits."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from npo_fast import (
    CEU,
    DPO,
    GA,
    KTO,
    NLL,
    NPO,
    TNPO,
    WGA,
    SatImp,
    SimNPO,
    linear_log_probs,
    linear_sequence_loss,
)
from npo_fast.ops.head import Head

CU = torch.tensor([0, 4, 9], dtype=torch.int32)
REF = torch.tensor([-6.0, -9.0], dtype=torch.float64)
FORGET = [
    GA(), NPO(0.1), NPO(2.0), SimNPO(), SimNPO(1.0, 0.5), KTO(0.1), KTO(0.5, -1.5), TNPO(0.1),
    TNPO(2.0), WGA(), WGA(0.3), SatImp(), SatImp(0.5, 2.0), CEU(),
]  # fmt: skip
ALL = [*FORGET, NLL(), DPO(0.1), DPO(1.5)]


def log_probs() -> torch.Tensor:
    return (-torch.rand(9, dtype=torch.float64) * 3).requires_grad_()


def reference_of(loss, seed: int = 3) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    if loss.reference == "token":
        return -torch.rand(9, generator=generator, dtype=torch.float64) * 3
    return REF if loss.reference == "sequence" else None


def gradient(loss, tokens, ref):
    return torch.autograd.grad(loss(tokens, CU, ref).sum(), tokens)[0]


@pytest.mark.parametrize("loss", FORGET, ids=repr)
def test_minimising_a_forget_loss_lowers_every_log_prob(loss):
    assert (gradient(loss, log_probs(), reference_of(loss)) > 0).all()


def test_minimising_dpo_raises_the_preferred_answer_and_lowers_the_other():
    g = gradient(DPO(), log_probs(), REF)
    assert (g[:4] < 0).all()
    assert (g[4:] > 0).all()


def test_minimising_the_retain_loss_raises_the_log_probs():
    assert (gradient(NLL(), log_probs(), None) < 0).all()


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_the_closed_form_is_the_derivative_that_autograd_finds(loss):
    tokens, ref = log_probs(), reference_of(loss)
    values, sequence_log_probs, g = loss.value_and_weight(tokens.detach(), CU, ref)
    torch.testing.assert_close(values, loss(tokens.detach(), CU, ref))
    torch.testing.assert_close(g, gradient(loss, tokens, ref))
    sums = torch.stack([tokens[:4].sum(), tokens[4:].sum()])
    torch.testing.assert_close(sequence_log_probs, sums.detach())


# Each loss again, written from its paper on the logits of one sequence (a pair for DPO) with
# what autograd needs and nothing of the package: log(sigmoid), softmax, products of probabilities.


def sequences_of(logits, labels):
    return [
        torch.log(torch.softmax(logits[a:b], -1)[torch.arange(b - a), labels[a:b]])
        for a, b in pairwise(CU.tolist())
    ]


def log_sigmoid(x):
    return -torch.log(1 + torch.exp(-x))


def weighted(weight):
    """A loss with weights that no gradient flows through."""

    def values(logits, labels, ref):
        refs = [None, None] if ref is None else [ref[:4], ref[4:]]
        return [
            (weight(tokens.exp().detach(), None if r is None else r.exp()) * tokens).sum()
            for tokens, r in zip(sequences_of(logits, labels), refs, strict=True)
        ]

    return values


def on_ratio(f):
    return lambda logits, labels, ref: [
        f(tokens.sum() - r) for tokens, r in zip(sequences_of(logits, labels), ref, strict=True)
    ]


def dpo(beta):
    def values(logits, labels, ref):
        preferred, forget = (
            tokens.sum() - r for tokens, r in zip(sequences_of(logits, labels), ref, strict=True)
        )
        return [-2 / beta * log_sigmoid(beta * (preferred - forget))]

    return values


PLAIN = [
    (GA(), lambda z, y, ref: [t.sum() for t in sequences_of(z, y)]),
    (NLL(), lambda z, y, ref: [-t.sum() for t in sequences_of(z, y)]),
    (NPO(0.7), on_ratio(lambda r: -2 / 0.7 * log_sigmoid(-0.7 * r))),
    (SimNPO(1.5, 0.4), lambda z, y, ref: [
        -2 / 1.5 * log_sigmoid(-1.5 * t.mean() - 1.5 * 0.4) for t in sequences_of(z, y)]),
    (DPO(0.3), dpo(0.3)),
    (KTO(0.3, 0.8), on_ratio(lambda r: 1 - 2 / 0.3 * log_sigmoid(0.8 - 0.3 * r))),
    (TNPO(0.6), weighted(lambda p, q: 2 * p**0.6 / (p**0.6 + q**0.6))),
    (WGA(0.5), weighted(lambda p, q: p**0.5)),
    (SatImp(1.5, 0.5), weighted(lambda p, q: p**1.5 * (1 - p) ** 0.5)),
    (CEU(), lambda z, y, ref: [-torch.log(1 - t.exp()).sum() for t in sequences_of(z, y)]),
    (CEU(2), lambda z, y, ref: [-torch.log(1 - t[2:].exp()).sum() for t in sequences_of(z, y)]),
    (TNPO(4.0, 1e-3), weighted(lambda p, q: 2 * p**4 / (p**4 + q**4 + 1e-3))),
]  # fmt: skip


def from_logits(values, hidden, weight, labels, ref):
    return torch.stack(values(hidden @ weight.T, labels, ref))


@pytest.mark.parametrize(("loss", "plain"), PLAIN, ids=[repr(x) for x, _ in PLAIN])
@pytest.mark.parametrize("chunk_rows", [None, 5, 2])
def test_the_fused_loss_is_plain_pytorch_on_the_logits(loss, plain, chunk_rows):
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    labels, ref = torch.randint(0, 13, (9,)), reference_of(loss)
    expected = from_logits(plain, hidden, weight, labels, ref).mean()
    found, _ = linear_sequence_loss(
        hidden, weight, labels, CU, loss, ref_log_probs=ref, chunk_rows=chunk_rows
    )
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("skip_first", [0, 1])
def test_ceu_is_the_cross_entropy_with_what_the_model_says_without_the_label(skip_first):
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(13, 6, dtype=torch.float64), torch.randint(0, 13, (9,))
    loss = CEU(skip_first)
    found, _ = linear_sequence_loss(hidden, weight, labels, CU, loss, reduction="sum")
    found = found + loss.target_entropy(Head(weight), hidden, labels, CU)
    logits = hidden @ weight.T
    target = torch.softmax(logits.detach().scatter(1, labels[:, None], -torch.inf), -1)
    expected = -(target * torch.log_softmax(logits, -1)).sum(1)
    expected = torch.cat([expected[skip_first:4], expected[4 + skip_first :]]).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (found, expected)))


@pytest.mark.parametrize("gap", [5.0, 14.0, 30.0, 300.0])
@pytest.mark.parametrize("loss", [CEU(), SatImp(), SatImp(5.0, 0.0), WGA(), TNPO()], ids=repr)
def test_a_token_the_model_is_sure_of_gives_finite_bounded_gradients(loss, gap):
    hidden = torch.eye(4)[:1].requires_grad_()
    weight = torch.zeros(5, 4)
    weight[2, 0] = gap
    ref = linear_log_probs(hidden.detach(), weight, torch.tensor([2]))
    value, _ = linear_sequence_loss(
        hidden, weight, torch.tensor([2]), torch.tensor([0, 1]), loss,
        ref_log_probs=ref if loss.reference == "token" else None,
    )  # fmt: skip
    (g,) = torch.autograd.grad(value, hidden)
    assert torch.isfinite(value)
    assert torch.isfinite(g).all()
    assert float(g.abs().max()) <= 1.5 * gap


def test_ceu_still_pushes_a_memorised_token():
    """In fp32 at p = 1 - 2e-5 the weight is p / (1 - p) to a percent."""
    tokens = torch.tensor([-2e-5])
    _, _, g = CEU().value_and_weight(tokens, torch.tensor([0, 1]))
    assert float(g) == pytest.approx(1 / 2e-5, rel=0.01)


def test_npo_weighs_a_sequence_by_how_much_is_left_of_it():
    """dL/dl is 2 sigmoid(beta r): 1 at the reference, near 0 once forgotten, 2 at most."""
    for r, expected in ((0.0, 1.0), (-200.0, 0.0), (200.0, 2.0)):
        tokens = torch.tensor([-5.0, -5.0], dtype=torch.float64, requires_grad=True)
        ref = torch.tensor([-10.0 - r], dtype=torch.float64)
        (g,) = torch.autograd.grad(NPO(0.1)(tokens, torch.tensor([0, 2]), ref).sum(), tokens)
        torch.testing.assert_close(g, torch.full_like(g, expected), atol=1e-6, rtol=1e-6)


def test_npo_tends_to_gradient_ascent_as_beta_vanishes():
    tokens = log_probs()
    beta = 1e-6
    npo = NPO(beta)(tokens, CU, REF) - 2 / beta * math.log(2.0)
    torch.testing.assert_close(npo, GA()(tokens, CU) - REF, atol=1e-3, rtol=0)
    of_npo, of_ga = gradient(NPO(beta), tokens, REF), gradient(GA(), tokens, None)
    torch.testing.assert_close(of_npo, of_ga, atol=1e-5, rtol=0)


def test_tnpo_is_npo_of_every_token_by_itself():
    tokens, ref = log_probs(), reference_of(TNPO())
    (of_npo,) = torch.autograd.grad(NPO(0.4)(tokens, torch.arange(10), ref).sum(), tokens)
    torch.testing.assert_close(gradient(TNPO(0.4), tokens, ref), of_npo)


def test_kto_is_npo_with_its_reference_moved_by_the_refusals():
    tokens, beta, z = log_probs(), 0.4, -1.3
    moved = NPO(beta)(tokens, CU, REF + z / beta) + 1
    torch.testing.assert_close(KTO(beta, z)(tokens, CU, REF), moved)


def test_simnpo_normalises_by_length():
    tokens = torch.full((9,), -2.0)
    values = SimNPO(2.5)(tokens, CU)
    assert values[0] == values[1], "four tokens and five tokens of the same probability"


def test_a_pair_is_one_value_and_a_lone_sequence_is_refused():
    hidden, weight, labels = torch.randn(9, 6), torch.randn(13, 6), torch.randint(0, 13, (9,))
    ref = torch.randn(3)
    with pytest.raises(ValueError, match="DPO takes sequences in groups of 2, got 3"):
        linear_sequence_loss(
            hidden, weight, labels, torch.tensor([0, 2, 5, 9]), DPO(), ref_log_probs=ref
        )
    values = DPO()(log_probs(), torch.tensor([0, 1, 4, 6, 9]), torch.randn(4))
    assert values.shape == (2,)


@pytest.mark.parametrize("loss", [NPO(), SimNPO(), DPO(), KTO(), TNPO(), WGA()], ids=repr)
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_a_beta_that_makes_no_sense_is_refused(loss, beta):
    with pytest.raises(ValueError, match=f"{type(loss).__name__}: beta must be positive"):
        dataclasses.replace(loss, beta=beta)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SatImp(-0.1),
        lambda: SatImp(1.0, math.nan),
        lambda: SimNPO(delta=math.inf),
        lambda: KTO(0.1, math.nan),
        lambda: TNPO(0.1, -1e-5),
    ],
)
def test_other_parameters_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="(beta1|beta2|delta|z|epsilon) must be finite"):
        make()


@pytest.mark.parametrize("skip_first", [-1, 1.5])
def test_ceu_skips_a_whole_number_of_tokens(skip_first):
    with pytest.raises(ValueError, match="skip_first must be a whole number, 0 or more"):
        CEU(skip_first)
