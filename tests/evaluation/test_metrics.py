"""Published figures from published logs, and the corners of the measures."""

import json
import math

import numpy as np
import pytest

from npo_fast import metrics
from npo_fast.errors import UserError
from tests.helpers import make_log, make_result

PUBLISHED = {
    "retain90_llama": 0.6203436494291608,
    "retain99_llama": 0.6220150094809674,
    "retain50_llama": 0.6503973633533173,
    "retain90_phi": 0.524251920557396,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_utility_is_the_published_one(tofu_logs, name):
    result = metrics.load_result(tofu_logs / f"{name}.json")
    assert abs(metrics.model_utility(result) - PUBLISHED[name]) <= 1e-12


def test_forget_quality_is_the_published_one(tofu_logs):
    ours, theirs = (metrics.load_result(tofu_logs / f"retain{n}_llama.json") for n in (50, 90))
    assert abs(metrics.forget_quality(ours, theirs) - 0.8483422371364409) <= 1e-12
    assert metrics.forget_quality(ours, ours) == 1.0


def test_logs_with_another_number_of_items_are_refused(tofu_logs):
    ours, theirs = (metrics.load_result(tofu_logs / f"retain{n}_llama.json") for n in (90, 99))
    with pytest.raises(UserError, match="has 300 forget items and the retrained log 40"):
        metrics.forget_quality(ours, theirs)


def test_lists_and_index_keyed_objects_are_the_same_log():
    listed, keyed = make_result(), make_result(as_objects=True)
    assert metrics.model_utility(listed) == metrics.model_utility(keyed)
    assert metrics.forget_quality(listed, keyed) == 1.0


def test_truth_ratio_is_small_where_the_answer_is_known():
    log = {"avg_paraphrased_loss": [0.1, 3.0], "average_perturb_loss": [[3.0, 5.0], [1.0, 1.0]]}
    np.testing.assert_allclose(metrics.truth_ratio(log), np.exp([0.1 - 4.0, 3.0 - 1.0]))


def test_options_normalise_the_probability():
    log = {"avg_gt_loss": [math.log(2)], "average_perturb_loss": [[math.log(4), math.log(4)]]}
    assert metrics.probability(log)[0] == pytest.approx(0.5)
    assert metrics.probability(log, options=True)[0] == pytest.approx(0.5)


def test_a_collapsed_model_has_utility_zero_and_no_warning(recwarn):
    log = make_log()
    dead = {**log, "avg_gt_loss": [900.0] * 6, "average_perturb_loss": [[900.0] * 3] * 6}
    dead |= {"avg_paraphrased_loss": [2000.0] * 6, "rougeL_recall": [0.0] * 6}
    result = {**make_result(), metrics.RETAIN: dead, metrics.FORGET: dead}
    assert metrics.model_utility(result) == 0.0
    assert metrics.forget_quality(result, make_result()) < 0.05
    assert 0 <= metrics.forget_truth_ratio(result) <= 1
    assert not recwarn.list


def test_results_survive_the_disk(tmp_path):
    result = make_result()
    metrics.save_result(result, tmp_path)
    assert (tmp_path / metrics.FORGET).exists()
    for source in (tmp_path, tmp_path / metrics.AGGREGATED):
        assert metrics.summary(metrics.load_result(source), result) == metrics.summary(
            result, result
        )
    single = metrics.load_result(tmp_path / metrics.FORGET)
    assert metrics.forget_quality(single, result) == 1.0


def test_a_bad_log_is_refused_by_name(tmp_path):
    path = tmp_path / "log.json"
    for content, message in (("{oops", "not a JSON"), ("[]", "expected a JSON object")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            metrics.load_result(path)
    with pytest.raises(UserError, match="no evaluation log"):
        metrics.load_result(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="holds no evaluation log"):
        metrics.load_result(tmp_path)
    with pytest.raises(UserError, match="no 'avg_gt_loss'"):
        metrics.probability({"gt_loss": [1.0]})
    with pytest.raises(UserError, match="NaN at example 1"):
        metrics.probability({"avg_gt_loss": [1.0, float("nan")]})
    with pytest.raises(UserError, match="no eval_log_forget.json"):
        metrics.forget_quality({metrics.RETAIN: make_log()}, make_result())


def test_a_summary_says_what_the_logs_allow():
    result = make_result()
    own_data = {metrics.FORGET: {"avg_gt_loss": [1.0], "rougeL_recall": [0.5]}}
    assert set(metrics.summary(own_data)) == {"forget probability", "forget ROUGE-L"}
    assert "forget quality" not in metrics.summary(result)
    whole = metrics.summary(json.loads(json.dumps(result)), result)
    assert whole["forget quality"] == 1.0
    assert 0 < whole["model utility"] < 1
