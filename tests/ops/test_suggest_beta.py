"""The suggested beta spends NPO's weight where a model stands that never knew the answers."""

import math

import numpy as np
import pytest
import torch

from npo_fast import NPO, UserError, suggest_beta


def test_the_weight_there_is_what_is_asked_for():
    known, unknown = torch.tensor([-0.5, -0.1, -0.3]), torch.tensor([-90.0, -12.3, -8.0])
    for spent in (0.05, 0.2):
        loss = NPO(suggest_beta(known, unknown, spent))
        log_probs = torch.tensor([-12.3], requires_grad=True)  # the median, of the median answer
        loss(log_probs, torch.tensor([0, 1]), torch.tensor([-0.3])).sum().backward()
        assert log_probs.grad.item() == pytest.approx(spent, rel=1e-5)


def test_it_is_the_formula_of_the_medians():
    known, unknown = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-10.0, -20.0])
    assert suggest_beta(known, unknown) == pytest.approx(math.log(19) / (15.0 - 2.5))
    assert suggest_beta(known, -15.0) == suggest_beta(known, unknown)


def test_a_few_answers_beyond_measure_change_little():
    known = torch.zeros(100)
    unknown = torch.linspace(-20, -5, 100)
    usual = suggest_beta(known, unknown)
    unknown[:5] = -1e6
    assert suggest_beta(known, unknown) == pytest.approx(usual)


@pytest.mark.parametrize(
    ("known", "unknown", "spent", "message"),
    [
        ([-5.0], [-5.0], 0.05, "nothing to forget"),
        ([-5.0], [-5.0001], 0.05, "nothing to forget"),
        ([-9.0], [-5.0], 0.05, "-9 under the reference and -5"),
        ([-1.0], [math.nan], 0.05, "unknown_log_probs must be finite"),
        ([-math.inf], [-5.0], 0.05, "ref_log_probs must be finite"),
        ([], [-5.0], 0.05, "ref_log_probs must be the log-probs of some sequences"),
        ([[-1.0]], [-5.0], 0.05, r"got the shape \(1, 1\)"),
        ([-1.0], [-5.0], 0.0, "spent must be between 0 and 1"),
        ([-1.0], [-5.0], 1.0, "spent must be between 0 and 1"),
        ([-1.0], [-5.0], 1e-320, "spent must be between 0 and 1"),
        ([-1.0], [-5.0], "0.1", "spent must be between 0 and 1"),
        ([-1.0], [-10.0, -math.inf, -5.0], 0.05, "unknown_log_probs must be finite"),
        ([math.inf, -1.0, -2.0], [-5.0], 0.05, "ref_log_probs must be finite"),
        ([50.0], [-5.0], 0.05, "ref_log_probs must be finite and no more than 0"),
    ],
)
def test_what_makes_no_beta_is_refused(known, unknown, spent, message):
    for form in (torch.tensor, list):
        with pytest.raises(UserError, match=message):
            suggest_beta(torch.tensor(known), form(unknown), spent)


@pytest.mark.parametrize("odd", [None, "x", {}, torch.tensor([1j]), torch.empty(2, device="meta")])
def test_what_is_no_log_prob_is_refused(odd):
    for arguments in ((odd, -5.0), (torch.tensor([-1.0]), odd)):
        with pytest.raises(UserError, match="must be log-probs of sequences"):
            suggest_beta(*arguments)


def test_lists_arrays_and_many_values_are_taken():
    expected = suggest_beta(torch.tensor([-1.0, -2.0]), torch.tensor([-9.0]))
    assert suggest_beta([-1.0, -2.0], [-9.0]) == expected
    assert suggest_beta(np.array([-1.0, -2.0]), -9.0) == expected
    many = torch.full((2**24 + 1,), -1.5)  # more than torch.quantile takes
    assert suggest_beta(many, -9.0) == expected
