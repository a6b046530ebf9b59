"""Signs, limits and weights of the losses."""

import pytest
import torch

from npo_fast import GA, NLL, NPO, SimNPO

CU = torch.tensor([0, 4, 9], dtype=torch.int32)
REF = torch.tensor([-6.0, -9.0], dtype=torch.float64)


def log_probs() -> torch.Tensor:
    return (-torch.rand(9, dtype=torch.float64) * 3).requires_grad_()


def after_a_step(loss, ref) -> tuple[float, float]:
    """Summed log-prob before and after one small step down the loss."""
    tokens = log_probs()
    (g,) = torch.autograd.grad(loss(tokens, CU, ref).sum(), tokens)
    return float(tokens.sum()), float((tokens - 1e-3 * g).sum())


@pytest.mark.parametrize("loss", [GA(), NPO(0.1), NPO(2.0), SimNPO(), SimNPO(1.0, 0.5)], ids=repr)
def test_minimising_a_forget_loss_lowers_the_log_probs(loss):
    before, after = after_a_step(loss, REF)
    assert after < before


def test_minimising_the_retain_loss_raises_the_log_probs():
    before, after = after_a_step(NLL(), None)
    assert after > before


def test_npo_is_the_equation_of_the_paper():
    """-(2 / beta) log sigmoid(-beta log(pi / pi_ref)), equation 3."""
    tokens, beta = log_probs(), 0.7
    ratio = torch.stack([tokens[:4].sum(), tokens[4:].sum()]) - REF
    expected = (2 / beta) * torch.log1p(torch.exp(beta * ratio))
    torch.testing.assert_close(NPO(beta)(tokens, CU, REF), expected)


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
    npo = NPO(beta)(tokens, CU, REF) - 2 / beta * torch.log(torch.tensor(2.0).double())
    torch.testing.assert_close(npo, GA()(tokens, CU) - REF, atol=1e-3, rtol=0)
    (of_npo,) = torch.autograd.grad(NPO(beta)(tokens, CU, REF).sum(), tokens)
    (of_ga,) = torch.autograd.grad(GA()(tokens, CU).sum(), tokens)
    torch.testing.assert_close(of_npo, of_ga, atol=1e-5, rtol=0)


def test_simnpo_normalises_by_length():
    tokens = torch.full((9,), -2.0)
    values = SimNPO(2.5)(tokens, CU)
    assert values[0] == values[1], "four tokens and five tokens of the same probability"


@pytest.mark.parametrize("make", [lambda: NPO(0.0), lambda: NPO(-1), lambda: SimNPO(float("nan"))])
def test_a_beta_that_makes_no_sense_is_refused(make):
    with pytest.raises(ValueError, match="beta must be positive"):
        make()
