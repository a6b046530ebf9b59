"""The synthetic experiment is the paper's, repeatable, and honest about what came out."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from npo_fast.cli import main
from npo_fast.experiments.synthetic import claims, experiment, theory
from npo_fast.experiments.synthetic.dataset import draw_dataset, kl
from npo_fast.experiments.synthetic.descent import Method, descend
from npo_fast.losses import GA, NLL, NPO

TINY = experiment.Steps(20, 50, 25, 50, 25)


@pytest.fixture(scope="module")
def dataset():
    return draw_dataset([0, 1], alpha=1.0)


def theta_of(dataset, methods=1):
    seeds, _, width = dataset.forget.features.shape
    random = torch.Generator().manual_seed(3)
    return 0.1 * torch.randn(seeds, methods, width, generator=random, dtype=torch.float64)


def test_kl_is_that_of_two_coins():
    p, q = 0.3, 0.9
    logit = torch.logit(torch.tensor([p, q], dtype=torch.float64))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert kl(logit[0], logit[1]).item() == pytest.approx(expected, rel=1e-12)
    far = kl(torch.tensor(-800.0).double(), torch.tensor(800.0).double())
    assert far.item() == pytest.approx(800)  # finite where probabilities underflow


def test_the_data_are_those_of_the_paper():
    datasets = [draw_dataset(range(30), alpha) for alpha in (0.0, 1.0)]
    for dataset in datasets:
        assert dataset.forget.features.shape == (30, 200, 128)
        assert dataset.retain.features.shape == (30, 1000, 128)
        # the logits are N(1, 1) and N(-1, 1): E sigmoid(N(1, 1)) = 0.697
        assert (dataset.forget.signs > 0).double().mean().item() == pytest.approx(0.697, abs=0.02)
        assert (dataset.retain.signs > 0).double().mean().item() == pytest.approx(0.303, abs=0.01)
        assert (dataset.idk.signs > 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
        assert torch.equal(dataset.idk.features, dataset.forget.features)
    # E ReLU(w . x)^2 is E (w . x)^2 / 2 = (1 + alpha^2) / 2: half of w . x is positive
    for dataset, expected in zip(datasets, (0.5, 1.0), strict=True):
        for features in (dataset.forget.features, dataset.fresh_retain):
            assert features.square().mean().item() == pytest.approx(expected, rel=0.05)


def test_a_seed_draws_the_same_data_in_any_company():
    both, alone = draw_dataset([0, 7], 1.0), draw_dataset([7], 1.0)
    assert torch.equal(both.forget.features[1:], alone.forget.features)
    assert torch.equal(both.retain.signs[1:], alone.retain.signs)
    assert not torch.equal(both.forget.features[0], both.forget.features[1])


@pytest.mark.slow
def test_the_start_is_near_the_papers(dataset):
    # longer training moves it on to the paper's (1.70, 0.02)
    reference, retrained = experiment.learn(dataset, 4000)
    forget, retain = dataset.distances(reference, retrained).mean((1, 2)).tolist()
    assert forget == pytest.approx(1.7, abs=0.5)
    assert retain == pytest.approx(0.02, abs=0.01)


FORMULAS = {
    "GA": lambda y, idk, ref, ref_idk, retain: y.mean(),
    "IDK+RT": lambda y, idk, ref, ref_idk, retain: -idk.mean() - retain.mean(),
    "NPO": lambda y, idk, ref, ref_idk, retain: -2 * F.logsigmoid(ref - y).mean(),
    "DPO+RT": lambda y, idk, ref, ref_idk, retain: (
        -20 * F.logsigmoid(0.1 * ((idk - ref_idk) - (y - ref))).mean() - retain.mean()
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_step_of_a_method_is_a_step_of_its_formula(dataset, name):
    method = next(m for m in experiment.GAP if m.name == name)
    start = theta_of(dataset)
    *_, (_, theta) = descend(start, [method], dataset.sources(), 2, 1)
    for seed in range(2):
        expected = start[seed, 0].clone()
        for _ in range(2):
            expected.requires_grad_()
            log_probs = [
                F.logsigmoid(samples.signs[seed] * (samples.features[seed] @ weights))
                for weights, samples in (
                    (expected, dataset.forget), (expected, dataset.idk),
                    (start[seed, 0], dataset.forget), (start[seed, 0], dataset.idk),
                    (expected, dataset.retain),
                )
            ]  # fmt: skip
            (gradient,) = torch.autograd.grad(FORMULAS[name](*log_probs), expected)
            expected = (expected - method.lr * gradient).detach()
        torch.testing.assert_close(theta[seed, 0], expected, rtol=1e-11, atol=1e-13)


def test_methods_that_run_together_do_not_mix(dataset):
    start = theta_of(dataset)
    together = start.repeat(1, len(experiment.GAP), 1)
    *_, (_, theta) = descend(together, experiment.GAP, dataset.sources(), 5, 5)
    for i, method in enumerate(experiment.GAP):
        *_, (_, alone) = descend(start, [method], dataset.sources(), 5, 5)
        torch.testing.assert_close(theta[:, i], alone[:, 0], rtol=1e-12, atol=1e-15)


def test_ga_and_npo_lower_what_is_forgotten_and_nll_raises_it(dataset):
    tried = [Method("", 0.1, (("forget", loss),)) for loss in (GA(), NPO(1.0), NLL())]
    start = theta_of(dataset).repeat(1, 3, 1)
    *_, (_, theta) = descend(start, tried, dataset.sources(), 3, 3)
    change = (dataset.forget.log_probs(theta) - dataset.forget.log_probs(start)).mean(-1)
    assert (change[:, :2] < 0).all()
    assert (change[:, 2] > 0).all()


@pytest.fixture(scope="module")
def tiny():
    return experiment.run([0, 1], TINY, lambda text: None)


@pytest.fixture(scope="module")
def laws():
    return theory.run([0], 200, lambda text: None)


@pytest.mark.slow
def test_the_same_seeds_give_the_same_curves(tiny):
    again = experiment.run([0, 1], TINY, lambda text: None)
    assert torch.equal(again.gap.forget, tiny.gap.forget)
    assert torch.equal(again.small_beta.retain, tiny.small_beta.retain)


@pytest.mark.slow
def test_all_methods_start_from_the_reference(tiny):
    for curves in vars(tiny).values():
        assert curves.steps == [0, 25, 50]
        start = curves.forget[0, :1].expand_as(curves.forget[0])
        torch.testing.assert_close(curves.forget[0], start, rtol=1e-10, atol=0)
        assert (curves.forget[1] != curves.forget[0]).all()


@pytest.mark.slow
def test_npo_tends_to_ga_in_first_order_of_beta(laws):
    assert laws.limit_order == pytest.approx(1, abs=0.02)
    for one in laws.limits:
        assert one.gradient_difference < 2 * one.beta


@pytest.mark.slow
def test_the_fits_find_the_laws_that_made_the_data():
    eta_t, n = torch.linspace(0, 1000, 50).double().numpy(), 8
    scale, c, r2 = theory.fit("NPO", eta_t, 3 * np.log1p(0.7 * eta_t / n), n)
    assert (scale, c, r2) == pytest.approx((3, 0.7, 1), rel=1e-4)
    assert theory.fit("GA", eta_t, 0.5 * eta_t, n) == pytest.approx((0.5, None, 1))


def curves(forget, retain, steps=(0, 500, 1000, 1500, 2000)):
    """Mean curves by method name, one seed."""
    columns = [
        torch.tensor([list(values[name]) for name in forget]).double().T.unsqueeze(2)
        for values in (forget, retain)
    ]
    return experiment.Curves(1.0, list(steps), [Method(n, 1, ()) for n in forget], *columns)


@pytest.mark.slow
def test_a_claim_holds_only_where_the_numbers_say_so(tiny, laws):
    rising, settled = [0.02, 0.1, 0.2, 0.4, 0.8], [0.02, 0.03, 0.04, 0.04, 0.04]
    falling = [1.7, 0.1, 0.004, 0.004, 0.004]
    good = {"GA": rising, "GA+RT": rising, "NPO": settled, "IDK+RT": settled}
    good |= {"DPO": rising, "NPO+RT": [0.02] * 5, "DPO+RT": settled}
    forget = {name: [1.7] * 5 if name == "IDK+RT" else falling for name in good}
    papers = claims.check(replace(tiny, gap=curves(forget, good)), laws)
    assert all(one.holds for one in papers if one.where == "alpha 1" and "tend" not in one.claim)
    swapped = {**good, "GA+RT": settled, "NPO+RT": rising, "NPO": rising, "GA": settled}
    slow = {name: [1.7, 1.7, 1.7, 1.7, 0.004] for name in good}
    wrong = claims.check(replace(tiny, gap=curves(slow, swapped)), laws)
    failed = {one.claim for one in wrong if not one.holds}
    assert len([c for c in failed if "tend" not in c]) >= 6
    for text in ("below 0.005", "GA+RT: retain", "NPO+RT: retain", "NPO+RT: best", "NPO: beats"):
        assert any(text in one for one in failed), (text, failed)


@pytest.mark.slow
def test_the_command_writes_claims_curves_and_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "QUICK", TINY)
    monkeypatch.setattr("npo_fast.cli.synthetic.QUICK_THEOREM_STEPS", 40)
    call = ["synthetic", "--quick", "--seeds", "3,1", "--output", str(tmp_path / "out"), "--json"]
    assert main(call) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["seeds"] == [3, 1]
    assert {"commit", "versions"} <= set(result["provenance"])
    assert json.loads((tmp_path / "out/result.json").read_text()) == result
    written = json.loads((tmp_path / "out/curves.json").read_text())
    npo = written["gap"]["methods"]["NPO+RT"]
    assert [len(npo["forget"]), len(npo["forget"][0])] == [2, 3]
    table = (tmp_path / "out/claims.md").read_text()
    assert table.count("holds") + table.count("does not hold") >= len(result["claims"])
    for name in ("distances", "pareto", "no_gap", "small_beta", "theorem"):
        size = (tmp_path / f"out/{name}.png").stat().st_size
        assert 10_000 < size < 250_000
    assert main(call) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*call, "--overwrite"]) == 0


@pytest.mark.parametrize("seeds", ["", "one", "1,1", "-1", "1.5", str(2**63)])
def test_bad_seeds_are_named(tmp_path, capsys, seeds):
    assert main(["synthetic", f"--seeds={seeds}", "--output", str(tmp_path / "out")]) == 2
    assert f"got {seeds!r}" in capsys.readouterr().err


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("")
    assert main(["synthetic", "--overwrite", "--output", str(tmp_path)]) == 2
    assert "name another --output" in capsys.readouterr().err
