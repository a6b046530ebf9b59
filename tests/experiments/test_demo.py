"""The demo has a fair dataset, and leaves what it promises (CI looks at the effect itself)."""

import json
import shutil

import pytest

from npo_fast import metrics
from npo_fast.cli import main
from npo_fast.data import load_records
from npo_fast.errors import UserError
from npo_fast.experiments.demo.dataset import make_dataset
from npo_fast.experiments.demo.experiment import (
    METHODS,
    Demo,
    DemoSettings,
    Outcome,
    conclusion,
    folder_of,
    make_room,
)
from npo_fast.metrics.verdict import Verdict
from npo_fast.reports.figures import Point
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import metadata_of

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


def test_held_out_authors_are_in_no_other_set():
    dataset = make_dataset(0, **SIZES)
    asked = {r.question for part in ("forget", "retain", "background", "common")
             for r in getattr(dataset, part)}  # fmt: skip
    assert len(dataset.holdout) == 70
    assert not {r.question for r in dataset.holdout} & asked
    for overlap in (0.0, 1.0):
        assert len(make_dataset(0, **SIZES, overlap=overlap).holdout) == 70


def test_the_saved_splits_are_read_again_as_they_were(tmp_path):
    dataset = make_dataset(0, **SIZES)
    dataset.save(tmp_path)
    for name, records in dataset.splits.items():
        assert load_records(name, str(tmp_path)) == records


@pytest.mark.slow
def test_the_demo_leaves_models_logs_steps_a_plot_and_a_page(tmp_path):
    short = TrainSettings(epochs=2, batch_size=16, lr=1e-3)
    settings = DemoSettings(**SIZES, pretraining=short, teaching=short, unlearning=short)
    demo = Demo(tmp_path, 0, settings)
    outcomes = demo.run()
    result = {"settings": {}, "models": {}}
    demo.write(outcomes, result)
    assert list(outcomes) == ["retrained", "original", *METHODS]
    assert outcomes["retrained"].last.forget_quality == 1.0
    for name in ("original", "retrained", *map(folder_of, METHODS)):
        assert (tmp_path / name / "model/model.safetensors").exists()
        logged = metrics.load_result(tmp_path / name / "eval")
        assert len(logged[metrics.FORGET]["avg_gt_loss"]) == 21
    steps = (tmp_path / "npo-rt/steps.jsonl").read_text().splitlines()
    assert len(steps) == 2 * 2
    assert [p.epoch for p in outcomes["NPO+RT"].path] == [1, 2]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (tmp_path / "unlearning.png").stat().st_size > 10_000
    assert outcomes["NPO+RT"].beta == metadata_of(tmp_path / "npo-rt")["beta"]
    assert "Unlearning report" in (tmp_path / "report.html").read_text()
    # its folders are models, data and runs of the front door
    again = ["--model", str(tmp_path / "original"), "--data", str(tmp_path / "data"),
             "--forget", "forget", "--retain", "retain"]  # fmt: skip
    assert main(["unlearn", *again, "--output", str(tmp_path / "more"), "--epochs", "1",
                 "--no-report"]) == 0  # fmt: skip
    assert main(["evaluate", *again, "--max-new-tokens", "2", "--retrained",
                 str(tmp_path / "retrained")]) == 0  # fmt: skip
    with pytest.raises(UserError, match="holds more, which no demo made"):
        make_room(tmp_path)
    shutil.move(tmp_path / "more", tmp_path / "npo-rt")
    make_room(tmp_path)  # all else is the demo's
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def outcome(qualities, utility=0.5):
    path = [Point(epoch, quality, 0.9) for epoch, quality in enumerate(qualities, 1)]
    return Outcome(path, utility, {}, Verdict("forgotten", ()))


def test_the_conclusion_says_who_passed_the_test_and_who_stayed():
    anchors = {"original": outcome([1e-30]), "retrained": outcome([1.0])}
    models = anchors | {
        "GA": outcome([0.3, 1e-5], 0.0), "GA+RT": outcome([0.01, 0.02], 0.3),
        "NPO+RT": outcome([0.01, 0.4]), "SimNPO+RT": outcome([0.06, 0.2], 0.48),
    }  # fmt: skip
    said = conclusion(models)
    assert said.startswith("NPO+RT (p 0.4, 100% of the utility) and SimNPO+RT (p 0.2, 96% of")
    assert "GA was there at epoch 1 (p 0.3) and left (p 1.00e-05, 0% of the utility)" in said
    assert "GA+RT did not (p 0.02, 60% of the utility)" in said
    lost = models | {"GA+RT": outcome([0.01, 0.2], 0.3)}
    assert "GA+RT passed at the cost of the rest (p 0.2, 60% of the utility)" in conclusion(lost)
    none = models | {name: outcome([0.3, 0.01]) for name in ("NPO+RT", "SimNPO+RT")}
    assert conclusion(none).startswith("no method forgot like a model that never knew")


@pytest.mark.parametrize("content", ["result.json", "thesis.txt"])
def test_the_demo_overwrites_nothing_by_accident(tmp_path, capsys, content):
    (tmp_path / content).write_text("{}")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "name another --output" in capsys.readouterr().err
    assert (tmp_path / content).exists()


@pytest.mark.parametrize(
    "files", [{"result.json": '{"my": "experiment"}'}, {"result.json": "{}", "thesis.txt": "x"}]
)
def test_the_demo_replaces_nothing_that_no_demo_made(tmp_path, capsys, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert main(["demo", "--output", str(tmp_path), "--overwrite"]) == 2
    assert f"{list(files)[-1]}, which no demo made" in capsys.readouterr().err
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == files


def test_the_demo_makes_room_for_itself(tmp_path):
    demo, link = tmp_path / "demo", tmp_path / "link"
    (demo / "npo-rt" / "model").mkdir(parents=True)
    (demo / "result.json").write_text('{"settings": {}, "models": {}}')
    link.symlink_to(demo)
    make_room(link)
    assert [file.name for file in demo.iterdir()] == ["result.json"]
    make_room(link)  # of one that broke off


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--seed", "9" * 20), "seed must be below 2**63"),
        (("--output", "file/sub"), "it is a file"),
    ],
)
def test_a_demo_that_cannot_run_says_so_before_it_makes_its_folder(
    tmp_path, monkeypatch, capsys, options, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["demo", *options]) == 2
    assert said in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
