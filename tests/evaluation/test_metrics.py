"""Published figures from published logs, and the corners of the measures."""

import json
import math

import numpy as np
import pytest

from npo_fast import metrics
from npo_fast.errors import UserError
from npo_fast.metrics.logs import REPHRASED
from npo_fast.metrics.measures import MEASURES, RECORDED, measures, value_of
from tests.helpers import make_log, make_result

PUBLISHED = {  # of the NPO paper's code, and of get_model_utility in utils.py of locuslab/tofu
    "retain90_llama": (0.6203436494291608, 0.5821921779512981),
    "retain99_llama": (0.6220150094809674, 0.5836470958531552),
    "retain50_llama": (0.6503973633533173, 0.621450730014044),
    "retain90_phi": (0.524251920557396, 0.5051143866150324),
    "ft_epoch5_lr1e-05_llama2-7b_full_wd0.01": (0.6226773637427152, 0.585886035092722),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_utility_is_the_published_one_by_both_means(tofu_logs, name):
    """The last one is ``data/NAME/eval_results/ds_size300/eval_log_aggregated.json`` of TOFU."""
    file = tofu_logs / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    numbers = metrics.summary(metrics.load_result(file))
    found = numbers["model utility"], numbers["model utility, arithmetic truth ratio"]
    assert found == pytest.approx(PUBLISHED[name], abs=1e-12)


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


def test_an_arithmetic_truth_ratio_is_of_the_mean_probability():
    log = {"avg_paraphrased_loss": [math.log(2)], "average_perturb_loss": [[math.log(4), 0.0]]}
    assert metrics.truth_ratio(log, arithmetic=True)[0] == pytest.approx((1 / 4 + 1) / 2 / (1 / 2))
    assert metrics.truth_ratio(log)[0] == pytest.approx(math.sqrt(1 / 4 * 1) / (1 / 2))


def test_one_wrong_answer_may_be_a_number():
    log = {"avg_gt_loss": [0.1, 3.0], "avg_paraphrased_loss": [0.1, 3.0]}
    listed, plain = ({**log, "average_perturb_loss": each} for each in ([[4.0], [1.0]], [4.0, 1.0]))
    for measure in (metrics.truth_ratio, lambda log: metrics.probability(log, options=True)):
        np.testing.assert_array_equal(measure(plain), measure(listed))


def test_options_normalise_the_probability():
    log = {"avg_gt_loss": [math.log(2)], "average_perturb_loss": [[math.log(4), math.log(4)]]}
    assert metrics.probability(log)[0] == pytest.approx(0.5)
    assert metrics.probability(log, options=True)[0] == pytest.approx(0.5)


def test_a_collapsed_model_has_utility_zero_and_no_warning(recwarn):
    log = make_log()
    dead = {**log, "avg_gt_loss": [900.0] * 6, "average_perturb_loss": [[900.0] * 3] * 6}
    dead |= {"avg_paraphrased_loss": [2000.0] * 6, "rougeL_recall": [0.0] * 6}
    result = {**make_result(), metrics.RETAIN: dead, metrics.FORGET: dead}
    assert metrics.model_utility(result) == metrics.model_utility(result, arithmetic=True) == 0.0
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
    for content, message in (("{oops", "not valid JSON"), ("[]", "not an object")):
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


def test_a_summary_has_these_labels_in_this_order():
    extra = {name: [0.5] * 6 for name in ("exact_memorization", "extraction_strength", "min_k",
             "kl_to_reference", "num_token_gt", "zlib_bytes", "min_k_plus_plus", "rougeL_f1",
             "repetition", "avg_reference_loss", "gradient_norm", "generated_loss",
             "num_token_generated", *(f"{name}{REPHRASED}" for name in
             ("avg_gt_loss", "rougeL_recall", "rougeL_f1")))}  # fmt: skip
    result = {name: {**log, **extra} for name, log in make_result().items()}
    for log in result.values():
        log |= {"ending": ["stop"] * 6, "vocabulary": 64}
    result[metrics.HOLDOUT] = result[metrics.FORGET]
    labels = list(metrics.summary(result, result))
    assert labels == [measure.label for measure in MEASURES.values()]
    tofu = ("probability", "ROUGE-L", "truth ratio")
    sets = (tofu[0], tofu[1], "ROUGE-L F1", tofu[2])
    ours = ("exact memorization", "extraction strength", "KL to reference",
            "answers without an end", "answers at the length limit", "repetition in answers",
            "answers less likely than random tokens", "truth ratio, right / (right + wrong)",
            *(f"{name}, paraphrased question" for name in sets[:3]),
            "perplexity of answers under the reference")  # fmt: skip
    assert labels == [
        "model utility",
        "model utility, arithmetic truth ratio",
        *(f"retain {name}" for name in sets),
        *(f"{part} {name}" for part in ("real authors", "world facts") for name in tofu),
        *(f"forget {name}" for name in sets),
        "forget quality",
        "smallest forget quality of as many records",
        *(f"{part} {name}" for part in ("forget", "retain") for name in ours),
        *(f"membership AUC, {attack}"
          for attack in ("loss", "zlib", "min-k", "min-k++", "reference", "gradnorm")),
        "privacy leakage, %, min-k",
        "membership AUC against retrained, %, min-k",
    ]  # fmt: skip


def test_recorded_measures_are_those_of_the_summary():
    result = make_result()
    numbers, scores = metrics.summary(result, result), measures(result, result)
    for key, measure in RECORDED.items():
        if measure.label in numbers:
            assert value_of(scores, key) == numbers[measure.label]
    assert set(scores) == {
        "forget_quality", "smallest_forget_quality", "model_utility", "forget", "retain",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("forget_quality", "retrained and a forget set with wrong answers"),
        ("model_utility", "a retain set, real authors and world facts with wrong answers and"),
        ("retain.probability", "a retain set"),
    ],
)
def test_a_measure_that_is_not_there_says_what_it_takes(key, words):
    with pytest.raises(UserError, match=f"{key} cannot be measured here: {key} takes {words}"):
        value_of({}, key)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model_utility", "higher is better"),
        ("forget.probability", "lower is forgotten"),
        ("retain.rouge_l_recall", "higher is kept"),
    ],
)
def test_a_direction_reads_as_words(key, words):
    assert MEASURES[key].better == words
