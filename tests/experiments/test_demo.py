"""The demo has a fair dataset, and leaves what it promises (CI looks at the effect itself)."""

import json

import pytest

from npo_fast import metrics
from npo_fast.cli import main
from npo_fast.experiments.demo.dataset import make_dataset
from npo_fast.experiments.demo.experiment import METHODS, Demo, DemoSettings
from npo_fast.trainer.settings import TrainSettings

SIZES = {"background": 4, "famous": 3, "authors": 6, "forget_share": 0.5}


def test_the_dataset_is_a_function_of_the_seed():
    assert make_dataset(1, **SIZES) == make_dataset(1, **SIZES)
    assert make_dataset(1, **SIZES) != make_dataset(2, **SIZES)


def test_wrong_answers_are_wrong_and_say_it_the_same_way():
    dataset = make_dataset(0, **SIZES)
    for record in dataset.forget + dataset.retain:
        assert len(set(record.perturbed_answers)) == 5
        assert record.paraphrased_answer not in record.perturbed_answers
        assert record.paraphrased_answer != record.answer
    for record in dataset.famous + dataset.countries:
        assert record.paraphrased_answer is None
        assert len(set(record.perturbed_answers)) == 3
        assert record.answer not in record.perturbed_answers


def test_what_is_forgotten_was_never_in_the_pretraining_or_the_retain_set():
    dataset = make_dataset(0, **SIZES)
    learnt_first = {r.question for r in dataset.background + dataset.common}
    forget, retain = ({r.question for r in part} for part in (dataset.forget, dataset.retain))
    assert not forget & retain
    assert not (forget | retain) & learnt_first
    assert {r.question for r in dataset.famous + dataset.countries} <= learnt_first
    assert len(dataset.forget) == len(dataset.retain) == 3 * 7


@pytest.mark.slow
def test_the_demo_leaves_models_logs_steps_and_a_plot(tmp_path):
    short = TrainSettings(epochs=2, batch_size=16, lr=1e-3)
    settings = DemoSettings(**SIZES, pretraining=short, teaching=short, unlearning=short)
    demo = Demo(tmp_path, 0, settings)
    outcomes = demo.run()
    demo.write(outcomes, {"seed": 0})
    assert list(outcomes) == ["retrained", "original", *METHODS]
    assert outcomes["retrained"].last.forget_quality == 1.0
    for name in ("original", "retrained", "ga", "ga-rt", "npo", "npo-rt"):
        assert (tmp_path / name / "model/model.safetensors").exists()
        logged = metrics.load_result(tmp_path / name / "eval")
        assert len(logged[metrics.FORGET]["avg_gt_loss"]) == 21
    steps = (tmp_path / "npo-rt/steps.jsonl").read_text().splitlines()
    assert len(steps) == 2 * 2
    assert [p.epoch for p in outcomes["NPO+RT"].path] == [1, 2]
    assert json.loads((tmp_path / "result.json").read_text()) == {"seed": 0}
    assert (tmp_path / "unlearning.png").stat().st_size > 10_000


@pytest.mark.parametrize("content", ["result.json", "thesis.txt"])
def test_the_demo_overwrites_nothing_by_accident(tmp_path, capsys, content):
    (tmp_path / content).write_text("{}")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "name another --output" in capsys.readouterr().err
    assert (tmp_path / content).exists()
