"""Evaluation while training: what is written, what is kept, and when it stops."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from npo_fast.cli import main
from npo_fast.errors import UserError
from npo_fast.metrics import FORGET, load_result, save_result, select
from npo_fast.metrics.measures import RECORDED, Condition, value_of
from npo_fast.runs.callbacks import EvaluationCallback
from npo_fast.runs.options import EvaluationOptions
from tests.helpers import FACTS, make_result, metadata_of, read_jsonl, save_tiny_model, write_jsonl


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "base")
    rows = [{**f, "paraphrased_answer": f["answer"], "perturbed_answer": ["Kim.", "Lee lives."]}
            for f in FACTS]  # fmt: skip
    data = folder / "data"
    data.mkdir()
    for name, part in (("forget", rows[6:]), ("retain", rows[:6]),
                       ("real_authors", rows[:2]), ("world_facts", rows[2:4])):  # fmt: skip
        write_jsonl(data / f"{name}.jsonl", part)
    write_jsonl(data / "all.jsonl", rows)
    assert main(["finetune", "--model", str(folder / "base"), "--data", str(data), "--train", "all",
                 "--output", str(folder / "taught"), "--epochs", "40", "--lr", "5e-3",
                 "--batch-size", "5"]) == 0  # fmt: skip
    assert main(["evaluate", "--model", str(folder / "base"), "--data", str(data), "--forget",
                 "forget", "--output", str(folder / "log"),
                 "--max-new-tokens", "4"]) == 0  # fmt: skip
    return folder


def unlearn(home, output, *more):
    return main(["unlearn", "--model", str(home / "taught"), "--data", str(home / "data"),
                 "--forget", "forget", "--retain", "retain", "--output", str(output), "--epochs",
                 "7", "--lr", "3e-3", "--batch-size", "4", "--max-new-tokens", "4", "--no-report",
                 *more])  # fmt: skip


@pytest.mark.slow
def test_evaluations_are_written_and_leave_the_training_alone(home, tmp_path):
    assert unlearn(home, tmp_path / "plain") == 0
    assert unlearn(home, tmp_path / "watched", "--eval-every", "3", "--eval-records", "3",
                   "--retrained", str(home / "log")) == 0  # fmt: skip
    looks = read_jsonl(tmp_path / "watched/evaluations.jsonl")
    assert [look["step"] for look in looks] == [0, 3, 6, 7], "the start and the end among them"
    for look in looks:
        assert all(0 <= value_of(look, measure) <= 1 for measure in RECORDED)
    assert looks[-1]["forget"]["probability"] < looks[0]["forget"]["probability"]
    plain, watched = (
        [s["loss"] for s in read_jsonl(tmp_path / name / "steps.jsonl")]
        for name in ("plain", "watched")
    )
    assert plain == watched
    assert not (tmp_path / "plain/evaluations.jsonl").exists()


@pytest.mark.slow
def test_the_best_evaluation_becomes_the_final_model(home, tmp_path, capsys):
    """Retain probability under gradient ascent: it falls, so the first look is the best."""
    output = tmp_path / "run"
    assert unlearn(home, output, "--method", "GA", "--eval-every", "2", "--keep-best",
                   "retain.probability", "--save-every", "2") == 0  # fmt: skip
    looks = read_jsonl(output / "evaluations.jsonl")
    best = max(looks[1:], key=lambda look: look["retain"]["probability"])
    assert best["step"] == 2
    facts = metadata_of(output)
    assert facts["best"] == {"measure": "retain.probability", **best}
    assert "the model of step 2, the best by retain.probability" in capsys.readouterr().out
    final, kept, last = (
        AutoModelForCausalLM.from_pretrained(output / name).state_dict()
        for name in ("model", "checkpoints/best", "checkpoints/step-000006")
    )
    assert all(torch.equal(final[name], kept[name]) for name in final)
    assert not all(torch.equal(final[name], last[name]) for name in final)


@pytest.mark.slow
def test_a_condition_ends_the_run_early(home, tmp_path):
    output = tmp_path / "run"
    assert (
        unlearn(home, output, "--eval-every", "1", "--stop-when", "forget.probability < 0.9") == 0
    )
    looks = read_jsonl(output / "evaluations.jsonl")
    assert looks[-1]["forget"]["probability"] < 0.9
    assert all(look["forget"]["probability"] >= 0.9 for look in looks[1:-1])
    assert len(read_jsonl(output / "steps.jsonl")) == looks[-1]["step"] < 7
    assert (output / "model/model.safetensors").exists()


def best_step(rows, **options):
    """The best of made-up evaluations, (forget quality, utility) each."""
    callback = EvaluationCallback(EvaluationOptions(eval_every=1, **options), dict)
    scores = [
        {"step": step, "forget_quality": quality, "model_utility": utility}
        for step, (quality, utility) in enumerate(rows)
    ]
    callback.load_state(scores[:1], {})
    for each in scores[1:]:
        if callback.is_best(each):
            callback.best = each
    return callback.best.get("step")


def test_the_best_is_sought_among_those_that_keep_the_utility():
    rows = [(0.9, 0.5), (0.1, 0.5), (0.3, 0.45), (0.8, 0.2), (0.3, 0.5)]
    assert best_step(rows, keep_best="forget_quality") == 3
    best = best_step(rows, keep_best="forget_quality", min_utility=0.9)
    assert best == 2, "the start does not count, and of equals the first"
    assert best_step(rows, keep_best="forget_quality", min_utility=1.1) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_best": "forget_qualty"}, "did you mean 'forget_quality'"),
        ({"stop_when": "model_utilty<0.5"}, "did you mean 'model_utility'"),
        ({"stop_when": "forget_quality=0.5"}, "write it as 'forget_quality>0.05'"),
        ({"stop_when": "forget_quality>much"}, "write it as"),
        ({"eval_every": -1}, "eval_every must be 0 or more"),
        ({"eval_every": 0, "keep_best": "model_utility"}, "add eval_every"),
        ({"min_utility": 0.5}, "add keep_best"),
        ({"eval_records": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        EvaluationOptions(**{"eval_every": 1, **options})


@pytest.mark.slow
def test_a_measure_that_the_data_does_not_allow_is_refused_before_the_run(home, tmp_path, capsys):
    assert unlearn(home, tmp_path / "a", "--eval-every", "2", "--keep-best", "forget_quality") == 2
    assert "forget_quality takes --retrained" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    save_result(make_result(items=9), tmp_path / "other")
    assert unlearn(home, tmp_path / "a", "--eval-every", "2", "--retrained",
                   str(tmp_path / "other")) == 2  # fmt: skip
    assert "has 9 forget items and --forget 4" in capsys.readouterr().err


@pytest.mark.slow
def test_conditions_and_selections_read_as_written(home):
    look = {"forget": {"probability": 0.5}}
    assert Condition.parse("forget.probability>=0.5").holds(look)
    assert not Condition.parse("forget.probability > 0.5").holds(look)
    log = load_result(home / "log")[FORGET]
    assert select(log, [2, 0])["gt_loss"] == [log["gt_loss"][2], log["gt_loss"][0]]
    assert select({"a": {"1": 5, "0": 4}}, [1])["a"] == [5]
