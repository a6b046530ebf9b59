"""Memorization and membership: hand-computed cases, and the full logits of a tiny model."""

import zlib

import numpy as np
import pytest
import torch

from npo_fast import metrics
from npo_fast.data import Record, Template, TokenizedExample, pack
from npo_fast.errors import UserError
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import tokenize_suite
from npo_fast.evaluation.tokens import token_scores
from npo_fast.kernels.transform import HeadTransform
from npo_fast.metrics.logs import CONVENTIONS
from npo_fast.metrics.memorization import (
    ATTACKS,
    Conventions,
    conventions_of,
    exact_memorization,
    extraction_strength,
    membership_scores,
    min_k,
    min_k_plus_plus,
    roc_auc,
)
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.load import load_model, load_tokenizer
from npo_fast.model.reference_states import open_reference_states
from npo_fast.ops.head import Head
from tests.helpers import FACTS, GEMMA2, save_tiny_model, tiny_model


@pytest.mark.parametrize(
    ("greedy", "exact", "strength"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),  # the question alone brings it out
        ([0, 1, 1, 1], 0.75, 0.75),  # after one token all the rest follows
        ([1, 1, 0, 1], 0.75, 0.25),
        ([0, 1, 0, 1], 0.5, 0.25),  # the last mistake counts, not the first
        ([1, 1, 1, 0], 0.75, 0.0),  # no prefix helps
        ([0], 0.0, 0.0),
    ],
)
def test_extraction_strength_counts_from_the_last_mistake(greedy, exact, strength):
    assert exact_memorization(greedy) == exact
    assert extraction_strength(greedy) == strength


def test_min_k_is_the_mean_of_the_lowest_fifth():
    log_probs = [-1.0, -9.0, -2.0, -3.0, -7.0, -1.0, -1.0, -1.0, -1.0, -1.0]
    assert min_k(log_probs) == -8.0
    assert min_k(log_probs[:3]) == -9.0, "at least one token"
    assert min_k(log_probs, share=1.0) == pytest.approx(np.mean(log_probs))


def test_min_k_plus_plus_measures_in_standard_deviations():
    assert min_k_plus_plus([-5.0, -1.0], [-3.0, -1.0], [2.0, 1.0], share=0.5) == -1.0
    assert min_k_plus_plus([0.0], [0.0], [0.0]) == 0.0, "a sure token is no 0 / 0"


def test_open_unlearning_counts_without_the_closing_token():
    greedy, log_probs = [1, 0, 1, 0], [-1.0, -8.0, -2.0, -9.0]
    answer = (greedy, log_probs, [-1.0] * 4, [1.0] * 4)
    ours, theirs = Conventions(), Conventions(memorization="open-unlearning")
    assert ours.columns(*answer, closed=True) == {
        "exact_memorization": 0.5, "extraction_strength": 0.0, "min_k": -9.0,
        "min_k_plus_plus": -8.0,
    }  # fmt: skip
    assert theirs.columns(*answer, closed=True) == pytest.approx({
        "exact_memorization": 2 / 3, "extraction_strength": 1 / 3, "min_k": -8.0,
        "min_k_plus_plus": -7.0,
    })  # fmt: skip
    cut = theirs.columns(*answer, closed=False)
    assert cut["exact_memorization"] == 0.5
    assert cut["extraction_strength"] == 0.25, "theirs is never 0"
    assert Conventions(min_k_share=0.5).columns(*answer, closed=True)["min_k"] == -8.5


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match="min_k_share must be above 0 and at most 1"):
        Conventions(min_k_share=share)


def test_auc_is_the_share_of_pairs_in_order():
    assert roc_auc([3, 4], [1, 2]) == 1.0
    assert roc_auc([1, 2], [3, 4]) == 0.0
    assert roc_auc([1, 1], [1, 1, 1]) == 0.5
    members, others = np.random.default_rng(0).integers(0, 9, (2, 40))
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert roc_auc(members, others) == pytest.approx(np.mean(pairs))


def test_every_attack_scores_a_known_text_higher():
    log = {"avg_gt_loss": [1.0, 2.0], "zlib_bytes": [10, 10], "min_k": [-1.0, -3.0],
           "min_k_plus_plus": [0.5, -0.5], "avg_reference_loss": [2.0, 2.0],
           "gradient_norm": [0.1, 3.0]}  # fmt: skip
    for attack in ATTACKS:
        known, unknown = membership_scores(log, attack)
        assert known > unknown, attack
    shorter = membership_scores({"avg_gt_loss": [1.0, 1.0], "zlib_bytes": [20, 10]}, "zlib")
    assert shorter[0] > shorter[1], "the same loss says less where zlib needs few bytes"


@pytest.mark.parametrize("family", ["Llama", GEMMA2, "Cohere", "Phi"])
def test_token_scores_are_those_of_the_full_logits(family):
    lm = CausalLM(tiny_model(family), probe=False)
    sequences = [
        TokenizedExample((3, 9, 30, 7, 61, 5), 2, 0),
        TokenizedExample((8, 4, 44, 2), 1, 1),
    ]
    (batch,) = pack(sequences, 100)
    found = token_scores(lm.linear_head, lm.hidden(batch), batch.labels)
    with lm.generating() as model, torch.no_grad():
        for part, index in zip(found.split([3, 4]), (1, 0), strict=True):
            ids = torch.tensor([sequences[index].input_ids])
            first = sequences[index].prompt_length
            log_p = model(input_ids=ids).logits[0, first - 1 : -1].double().log_softmax(-1)
            p, labels = log_p.exp(), ids[0, first:]
            mean = (p * log_p).sum(-1)
            std = (p * (log_p - mean[:, None]) ** 2).sum(-1).sqrt()
            exact = log_p.gather(1, labels[:, None]).squeeze(1)
            torch.testing.assert_close(part.log_probs.double(), exact, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(part.mean.double(), mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(part.std.double(), std, rtol=1e-4, atol=1e-4)
            assert torch.equal(part.greedy, log_p.argmax(-1) == labels)


def test_chunks_change_memory_and_not_the_scores(monkeypatch):
    head = Head(torch.randn(97, 16), bias=torch.randn(97), transform=HeadTransform(4.0, 0.5))
    hidden, labels = torch.randn(23, 16) * 3, torch.randint(97, (23,))
    whole = token_scores(head, hidden, labels)
    monkeypatch.setattr("npo_fast.ops.cost.CHUNK_BYTES", 97 * 4 * 5)
    monkeypatch.setattr("npo_fast.evaluation.tokens.MOMENTS_BYTES", 97 * 4 * 2)
    for part, other in zip(
        vars(token_scores(head, hidden, labels)).values(), vars(whole).values(), strict=True
    ):
        torch.testing.assert_close(part, other)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = str(save_tiny_model(tmp_path_factory.mktemp("tiny")))
    return load_model(folder), Template(load_tokenizer(folder), "plain")


def records(first: int, last: int) -> list[Record]:
    return [Record((("user", f["question"]),), f["answer"]) for f in FACTS[first:last]]


def test_evaluation_is_the_same_packed_and_alone(tiny):
    lm, template = tiny
    suite = {metrics.FORGET: records(0, 6), metrics.HOLDOUT: records(6, 10)}
    packed, alone = (
        evaluate(lm, template, suite, EvaluationSettings(n, generate=False)) for n in (4096, 1)
    )
    for name, log in packed.items():
        assert log["zlib_bytes"][0] == len(zlib.compress(suite[name][0].answer.encode()))
        assert log.pop(CONVENTIONS) == {"memorization": "papers", "min_k_share": 0.2}
        for key, values in log.items():
            np.testing.assert_allclose(values, alone[name][key], rtol=1e-4, err_msg=key)
    aucs = metrics.membership_auc(packed)
    assert set(aucs) == {"loss", "zlib", "min-k", "min-k++"}
    assert aucs == {
        name.removeprefix("membership AUC, "): value
        for name, value in metrics.summary(packed).items()
        if name.startswith("membership")
    }


def test_labels_tell_conventions_apart_that_cannot_be_compared(tiny):
    lm, template = tiny
    suite = {metrics.FORGET: records(0, 6), metrics.HOLDOUT: records(6, 10)}
    usual, theirs, wide = (
        evaluate(lm, template, suite, EvaluationSettings(generate=False, **conventions))
        for conventions in ({}, {"memorization": "open-unlearning"}, {"min_k_share": 0.5})
    )
    labels = [*metrics.summary(usual)]
    assert [*metrics.summary(theirs)] == [
        f"{label} (open-unlearning)" if "exact" in label or "strength" in label or "min-k" in label
        else label for label in labels
    ]  # fmt: skip
    assert [*metrics.summary(wide)] == [
        f"{label} (k = 0.5)" if "min-k" in label else label for label in labels
    ]
    assert metrics.select(theirs[metrics.FORGET], [0])[CONVENTIONS]["min_k_share"] == 0.4
    mixed = {**usual, metrics.HOLDOUT: theirs[metrics.HOLDOUT]}
    with pytest.raises(UserError, match="'papers', that of the holdout log 'open-unlearning'"):
        metrics.summary(mixed)
    unknown = {CONVENTIONS: {"memorization": "open-unlearning", "min_k_share": None}}
    assert conventions_of(unknown, min_k=True) == "open-unlearning, k not recorded"
    for damaged in (3, {"memorization": "mine"}, {"min_k": 0.2}):
        with pytest.raises(UserError, match="'conventions' are damaged"):
            conventions_of({CONVENTIONS: damaged}, min_k=True)


def test_kl_to_the_reference_is_that_of_the_full_logits(tiny):
    lm, template = tiny
    suite = {metrics.RETAIN: records(0, 4)}
    tokenized = tokenize_suite(template, suite)
    answers = {name: tokens.answers for name, tokens in tokenized.items()}
    reference = open_reference_states(lm, answers, None, "answer", 32)
    settings = EvaluationSettings(generate=False)
    (same,) = evaluate(lm, template, tokenized, settings, reference=reference).values()
    assert np.abs(same["kl_to_reference"]).max() < 1e-5
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    expected = []
    try:
        logits = [_logits(lm, template, r) for r in suite[metrics.RETAIN]]
        with torch.no_grad():
            for parameter in lm.model.parameters():
                parameter.mul_(1.05)
        (moved,) = evaluate(lm, template, suite, settings, reference=reference).values()
        for record, old in zip(suite[metrics.RETAIN], logits, strict=True):
            log_p, log_q = old.log_softmax(-1), _logits(lm, template, record).log_softmax(-1)
            expected.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    finally:
        lm.model.load_state_dict(before)
    np.testing.assert_allclose(moved["kl_to_reference"], expected, rtol=1e-3)
    total = np.average(expected, weights=moved["num_token_gt"])
    assert metrics.kl_to_reference(moved) == pytest.approx(total, rel=1e-3)


@torch.no_grad()
def _logits(lm: CausalLM, template: Template, record: Record) -> torch.Tensor:
    sequence = template.encode(record, 0)
    with lm.generating() as model:
        logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0]
    return logits[sequence.prompt_length - 1 : -1].double()


def test_a_published_log_has_no_memorization_in_its_summary(tofu_logs):
    numbers = metrics.summary(metrics.load_result(tofu_logs / "retain90_llama.json"))
    assert "model utility" in numbers
    assert not [name for name in numbers if "memorization" in name or "membership" in name]
