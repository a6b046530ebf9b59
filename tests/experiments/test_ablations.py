"""The ablations: overlap of the data, what counts as a collapse, what is written and shown."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from npo_fast.errors import UserError
from npo_fast.experiments.ablations.claims import claims
from npo_fast.experiments.ablations.page import AblationPage
from npo_fast.experiments.ablations.runner import Runner, run_seed
from npo_fast.experiments.ablations.trials import (
    EXPERIMENTS,
    GA_RT,
    LIMIT,
    NPO_RT,
    AblationSettings,
    Spread,
    Trial,
    best_quality,
    by_trial,
    collapse_step,
    load_seeds,
)
from npo_fast.experiments.demo.dataset import AUTHOR_RELATIONS, OTHER_WORDINGS, make_dataset
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import Page

COMMITTED = Path(__file__).parents[2] / "benchmarks/results/reviewers"
SIZES = {"background": 4, "famous": 3, "authors": 24, "forget_share": 0.5}
SHORT = TrainSettings(epochs=1, batch_size=16, lr=1e-3)
TINY = AblationSettings(
    world=replace(
        AblationSettings().world,
        background=2,
        famous=2,
        authors=4,
        pretraining=SHORT,
        teaching=SHORT,
    ),
    unlearning=replace(SHORT, epochs=2),
    looks_every=1,
    look_records=3,
    look_tokens=3,
)


def fact(record):
    """Which wording a record has, of whom it is, and the value."""
    for wording in AUTHOR_RELATIONS + OTHER_WORDINGS:
        pattern = re.escape(wording.question).replace(r"\{s\}", "(.+)")
        if match := re.fullmatch(pattern, record.question):
            author = match[1]
            return (
                wording.question,
                author,
                next(
                    v
                    for v in wording.values
                    if wording.answer.format(s=author, v=v) == record.answer
                ),
            )
    raise AssertionError(record.question)


def shared(dataset):
    """Shares of forgotten authors by their names, and of forgotten facts by wording, by value."""
    kept, gone = ([fact(r) for r in part] for part in (dataset.retain, dataset.forget))
    first, last = ({author.split()[i] for _, author, _ in kept} for i in (0, 1))
    authors = {author for _, author, _ in gone}
    both = sum(a.split()[0] in first and a.split()[1] in last for a in authors)
    either = sum(a.split()[0] in first or a.split()[1] in last for a in authors)
    wordings, values = {w for w, _, _ in kept}, {v for _, _, v in kept}
    same = {(w, v) for w, _, v in kept}
    return {
        "both names": both / len(authors),
        "any name": either / len(authors),
        "wording": sum(w in wordings for w, _, _ in gone) / len(gone),
        "value": sum(v in values for _, _, v in gone) / len(gone),
        "wording and value": sum((w, v) in same for w, _, v in gone) / len(gone),
    }


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 1.0])
def test_overlap_is_the_share_of_names_wordings_and_values_in_common(overlap):
    shares = shared(make_dataset(0, **SIZES, overlap=overlap))
    assert shares == pytest.approx(dict.fromkeys(shares, overlap))


def test_what_the_model_learns_first_does_not_depend_on_the_overlap():
    apart, shared = (make_dataset(0, **SIZES, overlap=overlap) for overlap in (0.0, 1.0))
    assert apart.background == shared.background
    assert apart.common == shared.common
    questions = {r.question for r in shared.retain}
    assert not questions & {r.question for r in shared.forget}
    assert len({r.question for r in shared.forget}) == len(shared.forget) == 12 * 7


def test_an_overlap_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"0 to 1, got 1\.5"):
        make_dataset(0, **SIZES, overlap=1.5)


def evaluations(*utilities):
    return [
        {"step": 4 * i, "epoch": float(i), "model_utility": u, "forget_quality": 0.01 * (i + 1)}
        for i, u in enumerate(utilities)
    ]


@pytest.mark.parametrize(
    ("utilities", "step"),
    [
        ((0.6, 0.5, 0.4, 0.35), None),
        ((0.6, 0.29, 0.2, 0.1), 4),
        ((0.6, 0.2, 0.4, 0.1, 0.0), 12),  # it was back once
        ((0.6, 0.2, 0.1, 0.31), None),  # and at the end
        ((0.6, 0.4, 0.3), None),  # half is not below half
    ],
)
def test_collapse_is_below_half_for_good(utilities, step):
    assert collapse_step(evaluations(*utilities)) == step


def test_the_best_evaluation_is_one_that_kept_the_utility():
    assert best_quality(evaluations(1.0, 0.9, 0.86, 0.5)) == pytest.approx(0.03)


def test_a_spread_is_mean_and_standard_deviation():
    assert Spread.of([1.0, 3.0]) == Spread(2.0, 2 - 2**0.5, 2 + 2**0.5)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_gradient_ascent_per_sequence_is_the_limit_of_npo():
    assert {t.name: t.reduction for t in LIMIT.terms(5.0)} == {
        "GA": "mean", "retain NLL": "token_mean",
    }  # fmt: skip
    assert {t.name: t.reduction for t in NPO_RT.terms(5.0)} == {
        "NPO": "mean", "retain NLL": "token_mean",
    }  # fmt: skip
    assert [t.coefficient for t in GA_RT.terms(5.0)] == [1.0, 5.0]
    with pytest.raises(ValueError, match=r"GA\+RT has no beta"):
        replace(GA_RT, beta=0.1).terms(5.0)


def test_claims_compare_the_runs_of_one_seed():
    runs = {
        NPO_RT: {1: evaluations(1.0, 0.9), 2: evaluations(1.0, 0.2)},
        GA_RT: {0: evaluations(1.0, 1.0), 1: evaluations(1.0, 0.8)},
    }
    claim = claims(runs)[0]
    assert claim.text == "NPO+RT keeps more utility than GA+RT"
    assert (claim.seen, claim.holds) == ("at the end 90% against 80%", "1 of 1 seeds")


def test_runs_without_a_seed_in_common_make_no_claim():
    runs = {trial: {i: evaluations(1.0, 0.9)} for i, trial in enumerate([NPO_RT, GA_RT, LIMIT])}
    assert claims(runs) == []


def test_a_setting_that_came_later_counts_as_usual(tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "__init__", lambda *_: pytest.fail("taught again"))
    content = {"settings": asdict(AblationSettings()), "runs": [], "time_s": 0.0}
    del content["settings"]["unlearning"]["weight_decay"]
    file = tmp_path / "seed-0.json"
    file.write_text(json.dumps(content))
    run_seed(0, [], AblationSettings(), file, {}, print)
    other = replace(
        AblationSettings(), unlearning=replace(AblationSettings().unlearning, weight_decay=0.5)
    )
    with pytest.raises(UserError, match="of other settings"):
        run_seed(0, [], other, file, {}, print)


@pytest.mark.slow
def test_committed_results_make_a_page_whatever_the_defaults_are_now():
    page = Page(AblationPage(load_seeds(COMMITTED)).html())
    assert page.tags.count("svg") > 0


def test_every_trial_of_the_experiments_can_be_built():
    for trials in EXPERIMENTS.values():
        for trial in trials:
            assert trial.terms(5.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of one seed with real runs, and of a second that is made of it."""
    folder = tmp_path_factory.mktemp("ablations")
    file = folder / "seed-0.json"
    told = []
    trials = [Trial("GA"), NPO_RT, Trial(schedule="alternating")]
    run_seed(0, trials, TINY, file, {"commit": "c0ffee", "versions": {"torch": "2"}}, told.append)
    assert len(told) == 3
    other = json.loads(file.read_text()) | {"seed": 1}
    for run in other["runs"]:
        for evaluation in run["looks"]:
            evaluation["forget_quality"] *= 0.5
    (folder / "seed-1.json").write_text(json.dumps(other))
    return folder


@pytest.mark.slow
def test_a_run_leaves_evaluations_from_step_0_to_the_last(folder):
    runs = by_trial(load_seeds(folder)[:1])
    npo, turns = runs[NPO_RT][0], runs[Trial(schedule="alternating")][0]
    assert [evaluation["step"] for evaluation in npo] == [0, 1, 2]
    assert [evaluation["step"] for evaluation in turns] == [0, 2, 4]
    assert [evaluation["epoch"] for evaluation in turns] == [
        evaluation["epoch"] for evaluation in npo
    ]
    assert npo[0]["forget_quality"] == turns[0]["forget_quality"], "the same model at the start"
    assert all(0 <= evaluation["model_utility"] <= 1 for evaluation in npo)


@pytest.mark.slow
def test_what_a_file_holds_is_not_run_again(folder, monkeypatch):
    monkeypatch.setattr(Runner, "__init__", lambda *_: pytest.fail("taught again"))
    before = (folder / "seed-0.json").read_text()
    run_seed(0, [NPO_RT, Trial("GA")], TINY, folder / "seed-0.json", {}, print)
    assert (folder / "seed-0.json").read_text() == before


@pytest.mark.slow
def test_results_of_other_settings_are_not_mixed(folder):
    other = replace(TINY, retain=1.0)
    with pytest.raises(UserError, match="holds ablations of other settings"):
        run_seed(0, [NPO_RT], other, folder / "seed-0.json", {}, print)
    with pytest.raises(UserError, match="holds no ablations"):
        load_seeds(folder / "none")


@pytest.fixture(scope="module")
def full(folder):
    """All trials, with the evaluations of one of them."""
    results = load_seeds(folder)
    for content in results:
        shared = content["runs"][1]["looks"]
        trials = dict.fromkeys(trial for each in EXPERIMENTS.values() for trial in each)
        content["runs"] = [{"trial": vars(trial), "looks": shared} for trial in trials]
    return AblationPage(results).html()


@pytest.mark.slow
def test_the_page_is_self_contained_with_a_sentence_a_figure(full):
    page = Page(full)
    assert not {"script", "link", "img"} & set(page.tags)
    assert "@import" not in full
    links = [v for _, name, v in page.attributes if name in ("src", "href", "xlink:href", "style")]
    assert not [v for v in links if "//" in v]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    figures = page.attributes.count(("svg", "class", "figure"))
    assert figures == page.tags.count("figcaption") == 11
    for title in ("When utility collapses", "Beta of NPO+RT", "Alternating steps",
                  "Forgotten facts entangled with kept ones"):  # fmt: skip
        assert title in page.texts
    assert "c0ffee" in page.text


@pytest.mark.slow
def test_the_page_shows_what_unfinished_ablations_have(folder):
    page = Page(AblationPage(load_seeds(folder)).html())
    assert "Beta of NPO+RT" not in page.texts
    assert "When utility collapses" in page.texts


@pytest.mark.slow
def test_a_page_of_two_methods_alone_is_drawn():
    results = load_seeds(COMMITTED)
    for content in results:
        content["runs"] = content["runs"][:2]
    page = Page(AblationPage(results).html())
    assert page.attributes.count(("svg", "class", "figure")) == 3
