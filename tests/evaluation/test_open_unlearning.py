"""Logs in open-unlearning's form: as its own code wrote them, as we write them, and what differs.

``open_unlearning/`` holds the files that its code (d3d7cf9, src/evals) wrote for a model of
``save_tiny_model`` that was taught some of ``FACTS``, with a k of 0.4.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import npo_fast
from npo_fast import metrics
from npo_fast.cli import main
from npo_fast.errors import UserError
from npo_fast.metrics import FORGET, HOLDOUT
from npo_fast.metrics.memorization import Conventions
from npo_fast.metrics.open_unlearning import EVAL, SUMMARY, metrics_of
from npo_fast.reports.runs import load_run
from npo_fast.runs.options import EvaluationOptions
from tests.helpers import FACTS, make_result, save_tiny_model, write_jsonl

THEIRS = Path(__file__).with_name("open_unlearning")
LABELS = {  # of our measures, and their names
    "model utility": "model_utility",
    **{f"{part} {ours}": f"{part}_Q_A_{theirs}" for part in ("forget", "retain")
       for ours, theirs in (("probability", "Prob"), ("ROUGE-L", "ROUGE"))},
    **{f"{ours} {name}": f"{part}_{metric}"
       for ours, part in (("real authors", "ra"), ("world facts", "wf"))
       for name, metric in (("probability", "Q_A_Prob_normalised"), ("ROUGE-L", "Q_A_ROUGE"),
                            ("truth ratio", "Truth_Ratio"))},
    "forget truth ratio": "forget_truth_ratio",
    "retain truth ratio": "retain_Truth_Ratio",
    "forget exact memorization (open-unlearning)": "exact_memorization",
    "forget extraction strength (open-unlearning)": "extraction_strength",
    "membership AUC, loss": "mia_loss",
    "membership AUC, zlib": "mia_zlib",
    "membership AUC, min-k (open-unlearning, k not recorded)": "mia_min_k",
    "membership AUC, min-k++ (open-unlearning, k not recorded)": "mia_min_k_plus_plus",
}  # fmt: skip


@pytest.fixture
def content() -> dict:
    return json.loads((THEIRS / EVAL).read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "base")
    rows = [{**fact, "paraphrased_answer": f"It is {fact['answer']}", "perturbed_answer":
             ["Kim lives in house 3.", "Lee."]} for fact in FACTS]  # fmt: skip
    for name, part in (("forget", rows[6:]), ("retain", rows[:3]), ("holdout", FACTS[3:6]),
                       ("real_authors", rows[:2]), ("world_facts", rows[2:4])):  # fmt: skip
        write_jsonl(folder / f"{name}.jsonl", part)
    return folder


def evaluate(home, *more: str, holdout: bool = True) -> int:
    sets = ["--forget", "forget", "--retain", "retain", *["--holdout", "holdout"] * holdout]
    return main(["evaluate", "--model", str(home / "base"), "--template", "plain", "--data",
                 str(home), *sets, "--max-new-tokens", "4", *more])  # fmt: skip


def save(content: dict, folder: Path, name: str = EVAL) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_their_logs_give_their_means():
    numbers = metrics.summary(metrics.load_result(THEIRS))
    theirs = json.loads((THEIRS / SUMMARY).read_text())
    assert {label: numbers[label] for label in LABELS} == pytest.approx(
        {label: theirs[metric] for label, metric in LABELS.items()}, abs=1e-6
    )


def test_what_was_read_is_written_as_it_was(content, tmp_path):
    """All but what compares with another model's logs, to their ten digits after the point."""
    metrics.save_result(metrics.load_result(THEIRS), tmp_path, "open-unlearning")
    written = json.loads((tmp_path / EVAL).read_text())
    assert content.keys() - written.keys() == {"forget_quality", "privleak"}
    for metric in written:
        assert numbers_in(written[metric]) == pytest.approx(numbers_in(content[metric]), abs=1e-6)
    again = metrics.load_result(tmp_path)
    assert metrics.summary(again) == metrics.summary(metrics.load_result(THEIRS))
    assert json.loads((tmp_path / SUMMARY).read_text()) == {
        name: metric["agg_value"] for name, metric in written.items()
    }


def numbers_in(content, path: str = "") -> dict[str, float]:
    if isinstance(content, (dict, list)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        parts = [numbers_in(value, f"{path}/{key}") for key, value in items]
        return {name: value for part in parts for name, value in part.items()}
    return {} if isinstance(content, str) else {path: content}


def test_our_measures_survive_their_form(home, tmp_path, capsys):
    ours, theirs, back = (tmp_path / name for name in ("ours", "theirs", "back"))
    for output, form in ((ours, "tofu"), (theirs, "open-unlearning")):
        assert evaluate(home, "--memorization", "open-unlearning", "--log-format", form,
                        "--output", str(output)) == 0  # fmt: skip
    assert "no place for ending, gt_loss, num_token_gt" in capsys.readouterr().err
    assert main(["evaluate", "--log", str(theirs), "--output", str(back)]) == 0
    expected = metrics.summary(metrics.load_result(ours))
    for logs in (theirs, back):
        found = metrics.summary(metrics.load_result(logs))
        found = {label.replace(", k not recorded", ""): value for label, value in found.items()}
        assert expected.keys() - found.keys() == {
            "retain exact memorization (open-unlearning)",
            "retain extraction strength (open-unlearning)",
            *(f"{part} {name}" for part in ("forget", "retain") for name in (
                "answers without an end", "answers at the length limit", "repetition in answers",
                "answers less likely than random tokens")),
        }  # fmt: skip
        assert found == pytest.approx({label: expected[label] for label in found}, abs=1e-6)
    texts = [metrics.load_result(logs)[FORGET]["generated_text"] for logs in (ours, theirs)]
    assert texts[0] == texts[1]


def test_forget_quality_compares_logs_of_either_form(tmp_path):
    ours, other = make_result(), make_result(shift=0.3)
    quality = metrics.forget_quality(ours, other)
    for name, result in (("ours", ours), ("other", other)):
        metrics.save_result(result, tmp_path / name, "open-unlearning", other)
    read, retrained = (metrics.load_result(tmp_path / name) for name in ("ours", "other"))
    for pair in ((ours, retrained), (read, other), (read, retrained)):
        assert metrics.forget_quality(*pair) == quality
    summary = json.loads((tmp_path / "ours" / SUMMARY).read_text())
    assert summary["forget_quality"] == pytest.approx(quality)
    first = metrics.retrained_log(tmp_path / "other", [None] * 6, [2, 0])[FORGET]
    assert first["avg_paraphrased_loss"] == pytest.approx(
        [other[FORGET]["avg_paraphrased_loss"][i] for i in (2, 0)]
    )


def test_a_collapsed_model_has_their_truth_ratio_in_their_form():
    """Their denominator is never below 1e-10, and their code compares with what it would write."""
    log = {"avg_gt_loss": [90.0], "avg_paraphrased_loss": [90.0], "average_perturb_loss": [[80.0]]}
    (row,) = metrics_of({FORGET: log})["forget_truth_ratio"]["value_by_index"].values()
    assert row["score"] == pytest.approx(np.exp(-80) / 1e-10)
    assert metrics.truth_ratio(log)[0] == pytest.approx(np.exp(10))


@pytest.mark.parametrize("conventions", [[], ["--min-k-share", "0.4"]])
def test_columns_of_other_conventions_are_not_written(home, tmp_path, capsys, conventions):
    assert evaluate(home, "--log-format", "open-unlearning", "--output", str(tmp_path),
                    *conventions) == 0  # fmt: skip
    assert "is without exact_memorization, extraction_strength, min_k" in capsys.readouterr().err
    written = json.loads((tmp_path / EVAL).read_text())
    assert not written.keys() & {"exact_memorization", "extraction_strength", "mia_min_k"}
    assert {"mia_loss", "mia_zlib", "model_utility"} <= written.keys()


def test_their_share_of_min_k_alone_is_written(home, tmp_path):
    assert evaluate(home, "--log-format", "open-unlearning", "--output", str(tmp_path),
                    "--memorization", "open-unlearning", "--min-k-share", "0.1") == 0  # fmt: skip
    written = json.loads((tmp_path / EVAL).read_text())
    assert "exact_memorization" in written
    assert "mia_min_k" not in written


def test_logs_say_how_they_were_counted(home, tmp_path):
    assert evaluate(home, "--memorization", "open-unlearning", "--output", str(tmp_path),
                    holdout=False) == 0  # fmt: skip
    log = metrics.load_result(tmp_path)[FORGET]
    assert log["conventions"] == Conventions(memorization="open-unlearning").entry()


# --- what a file may lack or mix ------------------------------------------------------------------


def test_a_mean_that_is_not_ours_is_told(content, tmp_path, capsys):
    content["forget_truth_ratio"]["agg_value"] = 0.9
    assert main(["evaluate", "--log", str(save(content, tmp_path))]) == 0
    shown = capsys.readouterr().err
    assert "forget_truth_ratio is 0.9 in the file, and 0.01922 by our definition" in shown
    assert "not read: forget_quality, privleak" in shown


def test_examples_without_a_value_leave_their_metric_out(content, tmp_path, capsys):
    content["exact_memorization"]["value_by_index"]["2"]["score"] = None
    assert main(["evaluate", "--log", str(save(content, tmp_path))]) == 0
    shown = capsys.readouterr()
    assert "exact_memorization is left out: 1 of 4 examples have none" in shown.err
    assert "exact memorization" not in shown.out
    assert "extraction strength" in shown.out


def test_some_metrics_will_do(content, tmp_path):
    few = {name: content[name] for name in ("mia_min_k", "forget_Q_A_PARA_Prob")}
    few["forget_Q_A_PERT_Prob"] = content["forget_Q_A_PERT_Prob"]
    result = metrics.load_result(save(few, tmp_path))
    assert set(metrics.summary(result, result)) == {
        "forget truth ratio", "forget quality", "smallest forget quality of as many records",
        "membership AUC, min-k (open-unlearning, k not recorded)",
        "forget truth ratio, right / (right + wrong)",
        "privacy leakage, %, min-k (open-unlearning, k not recorded)",
        "membership AUC against retrained, %, min-k (open-unlearning, k not recorded)",
    }  # fmt: skip
    assert [metrics.examples_in(result[file]) for file in (FORGET, HOLDOUT)] == [4, 5]


def test_examples_are_matched_by_their_index(content, tmp_path):
    for metric in ("forget_Q_A_Prob", "forget_Q_A_PERT_Prob"):
        rows = content[metric]["value_by_index"]
        content[metric]["value_by_index"] = dict(reversed(rows.items()))
    shuffled = metrics.load_result(save(content, tmp_path))
    assert metrics.forget_quality(shuffled, metrics.load_result(THEIRS)) == 1.0
    np.testing.assert_array_equal(
        *(metrics.truth_ratio(r[FORGET]) for r in (shuffled, metrics.load_result(THEIRS)))
    )


def test_what_cannot_be_read_is_refused_with_its_name(content, tmp_path):
    del content["forget_Q_A_PARA_Prob"]["value_by_index"]["3"]
    with pytest.raises(UserError, match="holds two evaluations: avg_paraphrased_loss is of 3"):
        metrics.load_result(save(content, tmp_path))
    content["forget_Q_A_PARA_Prob"]["value_by_index"] = {"0": {"prob": 0.5}}
    with pytest.raises(UserError, match="forget_Q_A_PARA_Prob: no 'avg_loss' by example"):
        metrics.load_result(save(content, tmp_path))
    means = {name: {"agg_value": metric["agg_value"]} for name, metric in content.items()}
    with pytest.raises(UserError, match="none of TOFU's metrics with values by example"):
        metrics.load_result(save(means, tmp_path))


def test_means_alone_are_refused_and_found_beside(content, tmp_path, capsys):
    file = save(json.loads((THEIRS / SUMMARY).read_text()), tmp_path, SUMMARY)
    for source in (file, tmp_path):
        with pytest.raises(UserError, match=f"means alone.*name the {EVAL}"):
            metrics.load_result(source)
    save(content, tmp_path)
    assert main(["evaluate", "--log", str(file)]) == 0
    assert f"{EVAL} beside it is read" in capsys.readouterr().err


def test_a_folder_has_logs_of_one_form(home, content, tmp_path):
    save(content, tmp_path)
    output = ["--output", str(tmp_path)]
    assert evaluate(home, *output, holdout=False) == 2, "the logs of the other form stay"
    metrics.save_result(make_result(), tmp_path / "both")
    save(content, tmp_path / "both")
    with pytest.raises(UserError, match="logs in 2 forms"):
        metrics.load_result(tmp_path / "both")
    assert evaluate(home, *output, "--overwrite", holdout=False) == 0
    assert not (tmp_path / EVAL).exists()
    assert (tmp_path / metrics.AGGREGATED).exists()


def test_a_run_may_hold_logs_of_either_form(content, tmp_path):
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    save(content, tmp_path / "eval")
    measured, source = load_run(tmp_path, "run").measured({})
    assert source == "eval/ logs, 4 forget records"
    assert measured["model_utility"] == pytest.approx(content["model_utility"]["agg_value"])
    (tmp_path / "eval").rename(tmp_path / "evals")  # as open-unlearning's runs have it
    assert FORGET in metrics.load_result(tmp_path)


def test_settings_that_would_do_nothing_are_refused(home, capsys):
    for words, message in (
        (["--log-format", "open-unlearning"], "name their folder with --output"),
        (["--log", str(THEIRS), "--memorization", "open-unlearning"], "the --log has its own"),
    ):
        assert evaluate(home, *words) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="memorization looks at evaluations: add eval_every"):
        EvaluationOptions(memorization="open-unlearning")
    with pytest.raises(UserError, match="log_format must be 'tofu' or 'open-unlearning', got 'x'"):
        npo_fast.evaluate(log=make_result(), log_format="x")
