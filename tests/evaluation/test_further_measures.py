"""Measures beyond TOFU's own, each against a formula in plain PyTorch on the same tensors."""

import json
import math

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

import npo_fast
from npo_fast import metrics
from npo_fast.cli import main
from npo_fast.data import Record, Template, load_records
from npo_fast.errors import UserError
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.metrics import FORGET, HOLDOUT, RETAIN
from npo_fast.metrics.logs import CONVENTIONS, REPHRASED
from npo_fast.metrics.memorization import Conventions, privleak, rel_diff
from npo_fast.model.load import load_model, load_tokenizer
from tests.helpers import FACTS, make_log, make_result, save_tiny_model, write_jsonl


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, the same model moved, and records with questions in other words."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "base")
    moved = load_model(str(folder / "base")).model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    moved.save_pretrained(folder / "moved")
    load_tokenizer(str(folder / "base")).save_pretrained(folder / "moved")
    rows = [{**f, "paraphrased_question": f"House {i}: who lives there?", "paraphrased_answer":
             f"It is {f['answer']}", "perturbed_answer": ["Kim lives in house 3.", "Lee."]}
            for i, f in enumerate(FACTS)]  # fmt: skip
    for name, part in (("forget", rows[6:]), ("retain", rows[:3]), ("holdout", FACTS[3:6])):
        write_jsonl(folder / f"{name}.jsonl", part)
    return folder


def run(home, model: str = "base", **arguments):
    """``npo_fast.evaluate``: settings of the evaluation by name, and its own arguments."""
    names = EvaluationSettings.__dataclass_fields__.keys() & arguments.keys()
    settings = {name: arguments.pop(name) for name in names}
    return npo_fast.evaluate(
        home / model, forget="forget", retain="retain", data=home,
        loading=npo_fast.ModelOptions(template="plain"),
        evaluation=EvaluationSettings(max_new_tokens=4, **settings), **arguments,
    )  # fmt: skip


def log_probs_of(model, ids: list[int], prompt: int) -> torch.Tensor:
    """Log-probs of the tokens after the prompt, from the model's own logits."""
    logits = model(torch.tensor([ids])).logits[0, prompt - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[prompt:])[:, None]).squeeze(1)


# ---- against the retrained model ----


def test_privacy_leakage_is_that_of_muse_and_open_unlearning():
    """The published file of open-unlearning has an AUC of 0.725 and, beside 0.5, -45 %."""
    assert privleak(0.725, 0.5) == pytest.approx(-44.999999990999996, rel=1e-12)
    assert privleak(1.0, 0.5) == pytest.approx(-100), "all of it is given away"
    assert privleak(0.25, 0.5) == pytest.approx(50), "unlearned too far"
    assert rel_diff(0.6, 0.5) == pytest.approx(20)


def with_min_k(forget: list[float], holdout: list[float], **conventions) -> dict:
    entry = {CONVENTIONS: Conventions(**conventions).entry()}
    return {FORGET: {"min_k": forget, **entry}, HOLDOUT: {"min_k": holdout, **entry}}


def test_privacy_leakage_compares_two_models_and_is_absent_without_the_second():
    ours = with_min_k([-1.0, -2.0, -3.0, -9.0], [-2.5, -4.0, -5.0, -6.0])  # 11 of 16 pairs
    theirs = with_min_k([-1.0, -7.0, -3.0, -9.0], [-2.5, -4.0, -5.0, -6.0])  # 7 of 16
    assert "privacy leakage, %, min-k" not in metrics.summary(ours)
    found = metrics.summary(ours, theirs)
    a, b = found["membership AUC, min-k"], metrics.summary(theirs)["membership AUC, min-k"]
    pairs = [m > o for m in (-1.0, -2.0, -3.0, -9.0) for o in (-2.5, -4.0, -5.0, -6.0)]
    assert a == np.mean(pairs)
    expected = 100 * ((1 - a) - (1 - b)) / (1 - b)
    assert found["privacy leakage, %, min-k"] == pytest.approx(expected)
    assert found["membership AUC against retrained, %, min-k"] == pytest.approx(100 * (a - b) / b)
    assert "privacy leakage, %, min-k" not in metrics.summary(ours, {FORGET: theirs[FORGET]})


def test_privacy_leakage_is_absent_where_the_two_count_min_k_differently():
    ours = with_min_k([-1.0, -2.0], [-3.0, -1.5])
    other = with_min_k([-1.0, -2.0], [-3.0, -1.5], memorization="open-unlearning")
    assert "privacy leakage, %, min-k" not in metrics.summary(ours, other)
    read = with_min_k([-1.0, -2.0], [-3.0, -1.5])
    for log in read.values():  # as from a TOFU_EVAL.json, which does not tell its k
        log[CONVENTIONS] = {"memorization": "open-unlearning", "min_k_share": None}
    assert "privacy leakage, %, min-k (open-unlearning)" in metrics.summary(other, read)


def test_logs_of_two_models_are_compared(home, tmp_path):
    logs = tmp_path / "retrained"
    theirs = run(home, "moved", holdout="holdout", generate=False, output=logs)
    theirs = theirs["membership AUC, min-k"]
    found = run(home, holdout="holdout", generate=False, retrained=logs)
    expected = 100 * (theirs - found["membership AUC, min-k"]) / (1 - theirs)
    assert found["privacy leakage, %, min-k"] == pytest.approx(expected)


def test_where_nothing_is_left_to_divide_by_there_is_no_measure():
    """A retrained model that knows the forget set, and one to which the holdout is likelier."""
    ours, members, strangers = (with_min_k([a, a], [-2.0, -3.0]) for a in (-2.5, -1.0, -4.0))
    leakage, difference = "privacy leakage, %, min-k", "membership AUC against retrained, %, min-k"
    assert {leakage, difference} & metrics.summary(ours, members).keys() == {difference}
    assert {leakage, difference} & metrics.summary(ours, strangers).keys() == {leakage}


# ---- of the answers ----


def test_the_right_share_is_right_over_right_and_wrong():
    log = {"avg_paraphrased_loss": [0.2, 900.0], "average_perturb_loss": [[1.0, 2.0], [3.0, 4.0]]}
    right, wrong = math.exp(-0.2), math.exp(-1.5)
    assert metrics.right_share(log) == pytest.approx([right / (right + wrong), 0.0])
    found = metrics.summary({FORGET: log})["forget truth ratio, right / (right + wrong)"]
    assert found == pytest.approx(right / (right + wrong) / 2)


def test_rouge_f1_is_kept_beside_recall(home, tmp_path):
    run(home, output=tmp_path)
    log = metrics.load_result(tmp_path)[FORGET]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [scorer.score(right, text)["rougeL"] for _, text, right in log["generated_text"]]
    assert log["rougeL_f1"] == pytest.approx([each.fmeasure for each in expected])
    numbers = metrics.summary({FORGET: log})
    assert numbers["forget ROUGE-L F1"] == pytest.approx(np.mean(log["rougeL_f1"]))


# ---- membership by a reference and by the gradient ----


@pytest.mark.parametrize("memorization", ["papers", "open-unlearning"])
def test_gradient_norms_are_those_of_a_plain_backward(home, memorization):
    lm = load_model(str(home / "moved"))
    template = Template(load_tokenizer(str(home / "base")), "plain")
    records = [Record((("user", f["question"]),), f["answer"]) for f in FACTS[:3]]
    for name, parameter in lm.model.named_parameters():
        parameter.requires_grad_("norm" not in name)  # as training left them
    before = {name: (p.requires_grad, p.clone()) for name, p in lm.model.named_parameters()}
    settings = EvaluationSettings(generate=False, gradient_norms=True, memorization=memorization)
    logs = evaluate(lm, template, {FORGET: records, RETAIN: records}, settings)
    assert "gradient_norm" not in logs[RETAIN], "it costs a backward a record"
    for name, parameter in lm.model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
    expected = []
    with lm.generating() as model:
        model.requires_grad_(True)
        for i, record in enumerate(records):
            example = template.encode(record, i)
            log_probs = log_probs_of(model, list(example.input_ids), example.prompt_length)
            if memorization == "open-unlearning":
                log_probs = log_probs[:-1]  # without the end of the turn
            gradients = torch.autograd.grad(-log_probs.mean(), list(model.parameters()))
            norms = torch.stack([gradient.norm() for gradient in gradients])
            papers = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            expected.append(float(papers if memorization == "papers" else norms.mean()))
    assert logs[FORGET]["gradient_norm"] == pytest.approx(expected, rel=1e-4)


def test_a_reference_gives_an_attack_and_the_perplexity_of_answers(home, tmp_path):
    run(home, holdout="holdout", reference=home / "moved", output=tmp_path, gradient_norms=True)
    result = metrics.load_result(tmp_path)
    reference, model = (load_model(str(home / name)).model.eval() for name in ("moved", "base"))
    template = Template(load_tokenizer(str(home / "base")), "plain")
    log = result[FORGET]
    with torch.no_grad():
        losses, generated, tokens = [], 0.0, 0
        for i, fact in enumerate(FACTS[6:]):
            example = template.encode(Record((("user", fact["question"]),), fact["answer"]), i)
            prompt = example.prompt_length
            losses.append(-float(log_probs_of(reference, [*example.input_ids], prompt).mean()))
            ids = torch.tensor([example.input_ids[:prompt]])
            whole = model.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist()
            answer = [t for t in whole[prompt:] if t not in template.stop_ids]
            if answer:
                whole = [*example.input_ids[:prompt], *answer]
                generated -= float(log_probs_of(reference, whole, prompt).sum())
                tokens += len(answer)
    assert log["avg_reference_loss"] == pytest.approx(losses, rel=1e-4)
    assert sum(log["num_token_generated"]) == tokens
    numbers = metrics.summary(result)
    label = "forget perplexity of answers under the reference"
    assert numbers[label] == pytest.approx(math.exp(generated / tokens), rel=1e-3)
    members, others = (
        np.subtract(result[file]["avg_reference_loss"], result[file]["avg_gt_loss"])
        for file in (FORGET, HOLDOUT)
    )
    auc = np.mean([(m > o) + (m == o) / 2 for m in members for o in others])
    assert numbers["membership AUC, reference"] == pytest.approx(auc)
    assert "membership AUC, gradnorm" in numbers


def test_attacks_survive_the_form_of_open_unlearning(home, tmp_path):
    theirs = tmp_path / "theirs"
    run(home, holdout="holdout", reference=home / "moved", output=theirs, gradient_norms=True,
        memorization="open-unlearning", log_format="open-unlearning", generate=False)  # fmt: skip
    written = json.loads((theirs / "TOFU_EVAL.json").read_text())
    back = metrics.load_result(theirs)
    for metric, attack in (("mia_reference", "reference"), ("mia_gradnorm", "gradnorm")):
        assert metrics.membership_auc(back)[attack] == pytest.approx(written[metric]["agg_value"])
    ours = [row["score"] for row in written["mia_gradnorm"]["forget"]["value_by_index"].values()]
    assert back[FORGET]["gradient_norm"] == pytest.approx(ours)


# ---- questions in other words ----


def test_questions_in_other_words_are_asked_where_they_are_wanted(home, tmp_path):
    run(home, output=tmp_path, paraphrased_questions=True)
    result = metrics.load_result(tmp_path)
    model = load_model(str(home / "base")).model.eval()
    template = Template(load_tokenizer(str(home / "base")), "plain")
    numbers = metrics.summary(result)
    for file, part, first in ((FORGET, "forget", 6), (RETAIN, "retain", 0)):
        log, losses = result[file], []
        for i in range(len(log["avg_gt_loss"])):
            question = f"House {first + i}: who lives there?"
            example = template.encode(Record((("user", question),), FACTS[first + i]["answer"]), i)
            with torch.no_grad():
                scores = log_probs_of(model, [*example.input_ids], example.prompt_length)
            losses.append(-float(scores.mean()))
            assert question in log[f"generated_text{REPHRASED}"][i][0]
        assert log[f"avg_gt_loss{REPHRASED}"] == pytest.approx(losses, rel=1e-4)
        assert log["avg_gt_loss"] != pytest.approx(losses, rel=1e-3)
        label = f"{part} probability, paraphrased question"
        assert numbers[label] == pytest.approx(np.exp(np.negative(losses)).mean(), rel=1e-4)
        assert f"{part} ROUGE-L, paraphrased question" in numbers


def test_a_paraphrased_question_is_read_from_every_form_of_record():
    for row in (
        {"question": "a", "answer": "b"},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "output": "b"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                      {"role": "assistant", "content": "b"}]},
    ):  # fmt: skip
        (record,) = load_records([{**row, "paraphrased_question": "c"}])
        assert record.rephrased.question == "c"
        assert record.rephrased.answer == "b"
        assert record.rephrased.messages[:-1] == record.messages[:-1]
        assert record.question == "a"
    with pytest.raises(UserError, match='"paraphrased_question" must be one text, got 2'):
        load_records([{"question": "a", "answer": "b", "paraphrased_question": ["c", "d"]}])


def test_tofu_has_a_paraphrased_question_for_every_forget_and_retain_record(tofu):
    for name in ("forget10_perturbed", "retain_perturbed"):
        records = load_records(name, str(tofu))
        assert all(r.rephrased and r.rephrased.question != r.question for r in records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gradient-norms"], "--gradient-norms tells --forget from --holdout: name --holdout"),
        (["--forget", "holdout", "--retain", "holdout", "--paraphrased-questions"],
         'no record has a "paraphrased_question"'),
        (["--forget", "mixed", "--paraphrased-questions"],
         'record 2 of eval_log_forget.json has no "paraphrased_question", and others have'),
        (["--log", "logs", "--gradient-norms"], "--gradient-norms is for evaluating a --model"),
        (["--log", "logs", "--lm-eval", "mmlu"], "--lm-eval runs a --model: leave out --log"),
    ],
)  # fmt: skip
def test_options_without_their_data_are_refused_before_the_model_is_loaded(
    home, capsys, options, message
):
    metrics.save_result(make_result(), home / "logs")
    options = [str(home / "logs") if option == "logs" else option for option in options]
    row = {"question": "a", "answer": "b"}
    write_jsonl(home / "mixed.jsonl", [{**row, "paraphrased_question": "c"}, row])
    sets = ["--data", str(home), "--forget", "forget", "--retain", "retain"]
    assert main(["evaluate", "--model", str(home / "base"), *sets, *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "loading" not in shown


def test_logs_without_the_new_columns_are_what_they_were():
    result = {**make_result(), HOLDOUT: make_log(shift=0.1)}
    labels = " ".join(metrics.summary(result, make_result()))
    for words in ("paraphrased question", "perplexity", "gradnorm", "reference", "leakage", "F1"):
        assert words not in labels
