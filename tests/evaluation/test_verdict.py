"""The verdict follows its written rules, the worst outcome first, with the number behind it."""

import json

import numpy as np
import pytest

from npo_fast import evaluate, finetune, metrics, unlearn
from npo_fast.cli import main
from npo_fast.errors import UserError, settings_as_flags
from npo_fast.metrics.evidence import Evidence, Level
from npo_fast.metrics.intervals import intervals
from npo_fast.metrics.measures import measures
from npo_fast.metrics.memorization import repetition
from npo_fast.metrics.tofu import smallest_forget_quality
from npo_fast.metrics.verdict import ADVICE, RULES, Verdict, judge, of_same_records
from npo_fast.runs import EvaluationOptions, MethodOptions, evaluating, unlearning
from npo_fast.runs.scores import Scores
from npo_fast.tables import number
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import FACTS, save_tiny_model, write_jsonl


def scores(forget=None, retain=None, **whole):
    parts = {"forget": forget, "retain": retain}
    return {**whole, **{name: part for name, part in parts.items() if part is not None}}


KNOWN = scores({"probability": 0.97, "rouge_l_recall": 1.0},
               {"probability": 0.98, "rouge_l_recall": 0.99})  # fmt: skip
RETRAINED = scores({"probability": 0.43}, {"probability": 0.95}, model_utility=0.62)
GONE, KEPT = {"probability": 0.06, "rouge_l_recall": 0.5}, {"probability": 0.94}
CASES = {
    "retain probability": ("collapsed", KNOWN, {}, scores(GONE, {"probability": 0.56}),
                           "retain probability 0.98 -> 0.56, 57% of it"),
    "retain ROUGE-L": ("collapsed", KNOWN, {}, scores(GONE, {"rouge_l_recall": 0.3}),
                       "retain ROUGE-L 0.99 -> 0.3"),
    "utility against the retrained model": (
        "collapsed", {}, RETRAINED, scores(GONE, KEPT, model_utility=0.3),
        "model utility 0.3 (retrained 0.62)"),
    "babble, with nothing to compare": (
        "collapsed", {}, {}, scores(GONE, {"below_chance": 0.9}),
        "90% of the retain answers are less likely than random tokens"),
    "loops": ("collapsed", scores(KNOWN["forget"], {"repetition": 0.1}), {},
              scores(GONE, {"repetition": 0.8}), "retain repetition in answers 0.1 -> 0.8"),
    "loops without a retain set": (
        "collapsed", scores({**KNOWN["forget"], "repetition": 0.0}), {},
        scores({**GONE, "repetition": 0.9}), "forget repetition in answers 0 -> 0.9"),
    "never known": (
        "nothing to forget", scores({"probability": 1.5e-4, "rouge_l_recall": 0.02}), {},
        scores({"probability": 1e-5}), "probability 1.50e-04 and ROUGE-L 0.02 before: never known"),
    "never known, and babble before": (
        "nothing to forget", scores({"probability": 1e-3}, {"below_chance": 0.7}), {},
        scores({"probability": 1e-5}, {"below_chance": 0.8}), "probability 0.001 before"),
    "words of the question alone": (
        "nothing to forget", scores({"probability": 0.008, "rouge_l_recall": 0.8}), {},
        scores({"probability": 1e-5}), "probability 0.008 and ROUGE-L 0.8 before"),
    "known no more than to the retrained": (
        "nothing to forget", scores({"probability": 0.4}), RETRAINED, scores({"probability": 0.1}),
        "0.4 before, no more than under the retrained model (0.43)"),
    "below chance": ("over-forgotten", KNOWN, {}, scores({"probability": 1e-6, "below_chance": 1.0},
                     KEPT), "100% of the forget answers are less likely than random tokens"),
    "told apart from below": (
        "over-forgotten", KNOWN, RETRAINED,
        scores(GONE, KEPT, forget_quality=1e-3, smallest_forget_quality=1e-9),
        "forget quality 0.001, and forget probability 0.06 (retrained 0.43)"),
    "far below the retrained model": (
        "over-forgotten", KNOWN, RETRAINED, scores({"probability": 0.002}, KEPT),
        "forget probability 0.002 (retrained 0.43)"),
    "told apart from above": (
        "not forgotten", KNOWN, RETRAINED,
        scores({"probability": 0.6}, KEPT, forget_quality=1e-3, smallest_forget_quality=1e-9),
        "forget quality 0.001, and forget probability 0.6 (retrained 0.43)"),
    "above the retrained, three records": (
        "not forgotten", KNOWN, RETRAINED,
        scores({"probability": 0.9}, KEPT, forget_quality=0.1, smallest_forget_quality=0.1),
        "forget probability 0.9 (retrained 0.43)"),
    "as likely as before": ("not forgotten", KNOWN, {}, scores({"probability": 0.7}, KEPT),
                            "forget probability 0.97 -> 0.7"),
    "recited as before": (
        "not forgotten", KNOWN, {}, scores({"probability": 0.3, "rouge_l_recall": 0.99}, KEPT),
        "forget ROUGE-L 1 -> 0.99"),
    "as before, though so few records cannot tell it from the retrained": (
        "not forgotten", KNOWN, RETRAINED,
        scores({"probability": 0.97}, KEPT, forget_quality=0.87, smallest_forget_quality=0.008),
        "forget probability 0.97 -> 0.97"),
    "likelier than not, and than under the retrained": (
        "not forgotten", {}, RETRAINED,
        scores({"probability": 0.9}, KEPT, forget_quality=0.87, smallest_forget_quality=0.008),
        "forget probability 0.9 (retrained 0.43)"),
    "likely, with nothing to compare": ("not forgotten", {}, {}, scores({"probability": 0.8}),
                                        "forget probability 0.8"),
    "gone": ("forgotten", KNOWN, {}, scores(GONE, KEPT),
             "forget probability 0.97 -> 0.06, retain probability 0.98 -> 0.94"),
    "gone, and nobody looked at the rest": (
        "forgotten", KNOWN, {}, scores(GONE), "what it keeps not measured (--retain)"),
    "gone, and nothing to compare the rest with": (
        "forgotten", scores(KNOWN["forget"]), {}, scores(GONE, KEPT),
        "retain probability 0.94, with no model to compare it with (--original)"),
    "gone, and the rest never known": (
        "forgotten", scores(KNOWN["forget"], {"probability": 1e-5}), {},
        scores(GONE, {"probability": 1e-5}), "1.00e-05 -> 1.00e-05, which it never knew"),
    "like the retrained": (
        "forgotten", KNOWN, RETRAINED,
        scores(GONE, KEPT, forget_quality=0.3, smallest_forget_quality=1e-9),
        "forget probability 0.97 -> 0.06 (retrained 0.43), forget quality 0.3"),
    "like the retrained, as far as three records tell": (
        "forgotten", KNOWN, RETRAINED,
        scores(GONE, KEPT, forget_quality=0.6, smallest_forget_quality=0.1),
        "forget quality 0.6, which as few records cannot bring below 0.1"),
    "unlikely, with nothing to compare": ("undecided", {}, {}, scores({"probability": 0.1}),
                                          "forget probability 0.1"),
    "nothing": ("undecided", KNOWN, {}, {}, "nothing was measured"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_rule_gives_its_outcome_and_its_number(case):
    outcome, before, retrained, after, reason = CASES[case]
    verdict = judge(Evidence(after, before, retrained))
    assert verdict.outcome == outcome
    assert reason in "; ".join(verdict.reasons)
    assert verdict == Verdict.of(json.loads(json.dumps(vars(verdict))))
    if outcome != "forgotten":
        assert verdict.advice


def test_every_outcome_but_the_last_has_a_case_and_a_rule():
    assert {case[0] for case in CASES.values()} == {*RULES, "undecided"} == {*ADVICE, "forgotten"}


def test_the_worst_outcome_comes_first():
    after = scores({"probability": 0.9}, {"probability": 0.1})
    assert judge(Evidence(after, KNOWN)).outcome == "collapsed", "not forgotten, and worse"


LEVEL = Level(-0.3, -12.3, "a number")


@pytest.mark.parametrize(
    ("log_prob", "more", "outcome"),
    [
        (-4.0, {}, "not forgotten"),
        (-13.0, {}, "forgotten"),
        (-50.0, {}, "forgotten"),
        (-90.0, {}, "over-forgotten"),
        (-90.0, {"forget_quality": 0.4, "smallest_forget_quality": 1e-9}, "forgotten"),
        (-4.0, {"forget_quality": 0.4, "smallest_forget_quality": 1e-9}, "forgotten"),
    ],
)
def test_how_far_it_went_decides_where_the_test_of_forgetting_is_not_there(log_prob, more, outcome):
    after = scores(GONE, KEPT, **more)
    verdict = judge(Evidence(after, KNOWN, level=LEVEL, log_prob=log_prob))
    assert verdict.outcome == outcome
    way = f"median log-prob of a forget answer -0.3 -> {number(log_prob)} (never known -12.3)"
    assert way in str(verdict)


def test_an_answer_as_likely_as_where_it_was_never_known_is_nothing_to_forget():
    evidence = Evidence(scores(GONE), level=Level(-13.0, -12.3, "a number"), log_prob=-40.0)
    assert judge(evidence).outcome == "nothing to forget"


def test_advice_names_flags_to_who_typed_them_and_keywords_to_callers():
    verdict = judge(Evidence(scores({"probability": 0.9}), KNOWN))
    assert "more epochs, a higher lr" in str(verdict)
    with settings_as_flags():
        assert "more --epochs, a higher --lr" in str(verdict)


def test_an_attack_that_stays_below_one_half_is_over_forgetting(all_resamples):
    after = scores(GONE, KEPT)
    for interval, outcome in (((0.1, 0.3), "over-forgotten"), ((0.4, 0.6), "forgotten")):
        found = judge(Evidence(after, KNOWN, intervals={"membership_auc.loss": interval}))
        assert found.outcome == outcome
    rng = np.random.default_rng(0)
    logs = {metrics.FORGET: {"avg_gt_loss": rng.normal(5, 1, 50).tolist()},
            metrics.HOLDOUT: {"avg_gt_loss": rng.normal(2, 1, 50).tolist()}}  # fmt: skip
    log_zlib = {name: {**log, "zlib_bytes": [30] * 50} for name, log in logs.items()}
    verdict = Scores(log_zlib, before=KNOWN).verdict
    assert verdict.outcome == "over-forgotten"
    assert "membership AUC by loss in [0, " in str(verdict)


def test_what_a_run_measured_before_counts_for_the_same_records_alone():
    before = {
        "forget": {"probability": 0.9, "answers": [{"truth": "Ada."}]},
        "retain": {"probability": 0.8, "answers": [{"truth": "Ben lives here."}]},
    }
    logs = {metrics.FORGET: {"generated_text": [["Q", "x", "Ada."], ["Q", "x", "Cleo."]]},
            metrics.RETAIN: {"generated_text": [["Q", "x", "Dan."]]}}  # fmt: skip
    assert of_same_records(before, logs) == {"forget": before["forget"]}
    assert of_same_records(before, {metrics.FORGET: {"avg_gt_loss": [1.0]}}) == before


def test_an_original_of_other_records_is_left_out(tmp_path, monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr(evaluating.logger, "warning", warned.append)
    log = {"avg_gt_loss": [0.1, 0.2], "generated_text": [["Q", "x", "Ada."], ["Q", "x", "Ben."]]}
    other = {**log, "generated_text": [["Q", "x", "Cleo."], ["Q", "x", "Dan."]]}
    logs = {metrics.FORGET: log}
    assert evaluate(log=logs, original=logs).verdict.reasons == (
        "forget probability 0.8618 -> 0.8618",)  # fmt: skip
    assert evaluate(log=logs, original={metrics.FORGET: other}).verdict.reasons == (
        "forget probability 0.8618",)  # fmt: skip
    assert len(warned) == 1
    assert "--original is of other records" in warned[0]


def test_logs_do_not_lie_among_the_files_of_a_model_or_a_run(tmp_path):
    for mark in ("run.json", "config.json", "adapter_config.json"):
        (tmp_path / mark).mkdir()
        (tmp_path / mark / mark).write_text("{}")
        with pytest.raises(UserError, match="name a folder of their own, such as .*eval"):
            evaluate(log=tmp_path, output=tmp_path / mark)


# ---- the numbers that it reads ----


def test_the_smallest_p_of_so_many_records_is_that_of_the_test():
    from scipy.stats import ks_2samp

    for n in (1, 2, 3, 5, 10):
        apart = ks_2samp(range(n), range(100, 100 + n)).pvalue
        assert smallest_forget_quality(n) == pytest.approx(apart, rel=1e-6)
    assert smallest_forget_quality(3) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([7] * 5, 1 / 2), ([7] * 103, 0.99),
     ([1, 2, 3, 4] * 2, 1 / 5)],
)  # fmt: skip
def test_repetition_is_the_share_of_runs_that_came_before(tokens, expected):
    assert repetition(tokens) == pytest.approx(expected)


def test_answers_below_chance_lose_more_than_a_token_drawn_evenly():
    log = {"avg_gt_loss": [0.1, np.log(50) - 0.01, np.log(50) + 0.01, 30.0], "vocabulary": 50}
    found = measures({metrics.FORGET: log, metrics.RETAIN: log})
    assert found["forget"]["below_chance"] == found["retain"]["below_chance"] == 0.5


def test_an_interval_holds_the_mean_of_most_samples_and_shrinks(all_resamples):
    rng = np.random.default_rng(0)
    widths, held = [], 0
    for n in (50, 800):
        for _ in range(20):
            log = {"avg_gt_loss": rng.exponential(1.0, n).tolist()}
            low, high = intervals({metrics.FORGET: log})["forget.probability"]
            widths.append(high - low)
            held += low < 0.5 < high  # E exp(-x) of x ~ Exp(1)
    assert held >= 34, "of 40, at 95 %"
    assert np.mean(widths[:20]) == pytest.approx(4 * np.mean(widths[20:]), rel=0.2)
    assert intervals({metrics.FORGET: {"avg_gt_loss": [1.0]}}) == {}, "one record has no spread"


# ---- whole runs ----


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdict")
    save_tiny_model(folder / "base")
    write_jsonl(folder / "forget.jsonl", FACTS[6:])
    write_jsonl(folder / "retain.jsonl", FACTS[:6])
    finetune(str(folder / "base"), train=FACTS, output=folder / "taught",
             training=TrainSettings(epochs=40, lr=1e-2, batch_size=5, warmup_steps=2))  # fmt: skip
    return folder


def forget(home, output, model="taught", method="NPO+RT", **training):
    return unlearn(str(home / model), forget=FACTS[6:], retain=FACTS[:6], method=method,
                   output=output, training=TrainSettings(batch_size=2, warmup_steps=0, **training),
                   )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("outcome", "settings"),
    [
        ("collapsed", {"method": "GA", "epochs": 8, "lr": 1e-2}),
        ("collapsed", {"epochs": 4, "lr": 10.0}),
        ("not forgotten", {"epochs": 1, "lr": 1e-6}),
        ("forgotten", {"method": MethodOptions("NPO+RT", beta=0.3, retain_coefficient=5.0),
                       "epochs": 20, "lr": 1e-3}),
        ("nothing to forget", {"model": "base", "epochs": 1, "lr": 1e-5}),
    ],
)  # fmt: skip
def test_a_run_ends_with_its_verdict(home, tmp_path, monkeypatch, outcome, settings):
    warned: list[str] = []
    monkeypatch.setattr(unlearning.logger, "warning", warned.append)
    run = forget(home, tmp_path / "run", **settings)
    assert run.verdict.outcome == outcome
    assert run.metadata["verdict"]["outcome"] == outcome
    said = any("never known" in warning for warning in warned)
    assert said == (outcome == "nothing to forget"), "said before the first step"
    assert f"Verdict: {outcome}" in (tmp_path / "run/model/README.md").read_text()


def verdict_and_below(printed):
    """The line of the verdict, and what to do next below it."""
    return printed.partition("\nverdict: ")[2].splitlines()


@pytest.mark.slow
def test_commands_end_with_it_and_reports_show_it(home, tmp_path, capsys):
    data = ["--forget", str(home / "forget.jsonl"), "--retain", str(home / "retain.jsonl")]
    output = ["--output", str(tmp_path / "run")]
    assert main(["unlearn", "--model", str(home / "taught"), *data, *output, "--epochs", "8",
                 "--method", "GA", "--lr", "1e-2", "--warmup-steps", "0"]) == 0  # fmt: skip
    verdict, *steps = verdict_and_below(capsys.readouterr().out)
    assert verdict.startswith("collapsed: retain probability ")
    assert "--retain-coefficient" in verdict
    assert [step.split()[:2] for step in steps if "npo-fast" in step] == [
        ["npo-fast", "evaluate"], ["npo-fast", "report"]
    ], "only what to do next stands below"  # fmt: skip

    logs = str(tmp_path / "run/eval")
    assert main(["evaluate", "--model", str(tmp_path / "run"), *data, "--output", logs]) == 0
    verdict, *_ = verdict_and_below(capsys.readouterr().out)
    assert verdict.startswith("collapsed: retain probability ")
    assert "->" in verdict, "with what the run measured before its first step"

    assert main(["evaluate", "--log", logs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"]["outcome"] == "collapsed", "babble needs nothing to compare with"
    low, high = found["intervals"]["retain probability"]
    assert low <= found["metrics"]["retain probability"] <= high

    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "run"), "--output", str(page)]) == 0
    _, _, card = page.read_text().partition("</span> Collapsed")
    assert "retain probability" in card[:600], "the reasons stand below the outcome"
    assert "collapsed: retain probability" in page.with_suffix(".md").read_text()


@pytest.mark.slow
def test_a_run_that_is_watched_is_judged_by_its_evaluations(home, tmp_path):
    run = unlearn(
        str(home / "taught"), forget=FACTS[6:], retain=FACTS[:6], output=tmp_path / "run",
        training=TrainSettings(batch_size=2, epochs=1, lr=1e-6),
        evaluation=EvaluationOptions(eval_every=2, eval_records=3),
    )  # fmt: skip
    assert run.verdict.outcome == "not forgotten"
    assert "forget probability" in run.verdict.reasons[0]
