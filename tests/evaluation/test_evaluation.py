"""What an evaluation measures, on which records, and what it refuses."""

import json

import pytest

from npo_fast import metrics
from npo_fast.cli import main
from npo_fast.data import Template, load_records
from npo_fast.errors import UserError
from npo_fast.evaluation.rouge import rouge_scorer
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import tofu_suite
from npo_fast.model.load import load_tokenizer
from tests.helpers import FACTS, save_tiny_model, tiny_model, write_jsonl

WRONG = [{**fact, "perturbed_answer": ["Kim.", "Lee lives."]} for fact in FACTS]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "base")
    write_jsonl(folder / "forget.jsonl", WRONG[:4])
    write_jsonl(folder / "plain.jsonl", FACTS[4:])
    return folder


def load_template(home) -> Template:
    return Template(load_tokenizer(str(home / "base")), "plain")


def evaluate(home, *more: str) -> int:
    return main(["evaluate", "--model", str(home / "base"), "--max-new-tokens", "2", *more])


# --- which records --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forget", "retain", "sizes"),
    [
        ("forget10", "retain90", (400, 400)),
        ("forget50", "retain50", (400, 400)),
        ("forget01", "retain", (40, 400)),
        ("forget05[:20]", "retain95", (20, 400)),
        ("forget01", "retain99", (40, 400)),
    ],
)
def test_utility_and_forget_quality_can_be_measured_on_tofu(tofu, forget, retain, sizes):
    suite = tofu_suite(str(tofu), forget, retain)
    assert (len(suite[metrics.FORGET]), len(suite[metrics.RETAIN])) == sizes
    for split, log in ((forget, metrics.FORGET), (retain, metrics.RETAIN)):
        assert all(record.perturbed_answers for record in suite[log])
        if split != "retain":
            asked = {record.messages for record in load_records(split, str(tofu))}
            assert asked >= {record.messages for record in suite[log]}


def test_wrong_answers_come_from_the_perturbed_file_beside(tmp_path):
    write_jsonl(tmp_path / "f.jsonl", FACTS)
    assert not tofu_suite(str(tmp_path), "f", None)[metrics.FORGET][0].perturbed_answers
    write_jsonl(tmp_path / "f_perturbed.jsonl", WRONG)
    found = tofu_suite(str(tmp_path), "f[:3]", None)[metrics.FORGET]
    assert [len(record.perturbed_answers) for record in found] == [2, 2, 2]


def test_a_record_without_wrong_answers_is_reported(tmp_path):
    write_jsonl(tmp_path / "f.jsonl", [*WRONG[:3], FACTS[3]])
    with pytest.warns(UserWarning, match="1 of 4 records have no wrong answers"):
        tofu_suite(str(tmp_path), "f", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{oops}", "line 1: not valid JSON"),
        (json.dumps(WRONG[0]), "asks other questions than f"),
        ("\n".join(map(json.dumps, [*WRONG[:9], WRONG[8]])), "asks other questions than f"),
        (
            "\n".join(map(json.dumps, [*WRONG[:9], {**WRONG[9], "perturbed_answer": ["Kim."]}])),
            "found from 1 to 2",
        ),
        (
            "\n".join(map(json.dumps, [*WRONG[:9], {**WRONG[9], "answer": "Kim."}])),
            "has another right answer to record 10 than f, 'Kim.' and not",
        ),
    ],
    ids=["damaged", "fewer", "another order", "uneven", "another answer"],
)
def test_wrong_answers_that_cannot_be_used_are_refused(tmp_path, content, message):
    write_jsonl(tmp_path / "f.jsonl", FACTS)
    (tmp_path / "f_perturbed.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        tofu_suite(str(tmp_path), "f", None)


# --- which measures -------------------------------------------------------------------------------


def test_a_set_with_wrong_answers_has_a_truth_ratio_without_the_other_sets(home, capsys):
    both = ("--forget", str(home / "forget.jsonl"), "--retain", str(home / "forget.jsonl"))
    assert evaluate(home, *both, "--json") == 0
    numbers = json.loads(capsys.readouterr().out)["metrics"]
    assert "model utility" not in numbers
    assert 0 <= numbers["retain truth ratio"] <= 1
    assert 0 <= numbers["forget truth ratio"] <= 1


def test_forget_quality_takes_losses_alone():
    log = {"avg_gt_loss": [1.0, 2.0], "avg_paraphrased_loss": [1.0, 2.0],
           "average_perturb_loss": [[3.0, 4.0], [1.0, 2.0]]}  # fmt: skip
    result = {metrics.FORGET: log}
    assert metrics.summary(result, result)["forget quality"] == 1.0


@pytest.mark.parametrize("verb", ["evaluate", "attack", "unlearn"])
def test_a_retrained_log_that_cannot_be_used_is_refused_first(home, tmp_path, capsys, verb):
    assert evaluate(home, "--forget", str(home / "plain.jsonl"), "--output", str(tmp_path)) == 0
    call = [verb, "--model", str(home / "base"), "--forget", str(home / "plain.jsonl"),
            "--retrained", str(tmp_path), "--output", str(tmp_path / "out")]  # fmt: skip
    if verb == "unlearn":
        call += ["--method", "NPO", "--eval-every", "1"]
    assert main(call) == 2
    assert "forget record 1 has no wrong answers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("verb", ["evaluate", "attack", "unlearn"])
def test_a_retrained_log_of_other_records_is_refused_first(
    home, tmp_path, capsys, monkeypatch, verb, log
):
    for name, rows in (("forget", WRONG[:4]), ("other", WRONG[1:5])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        call = ("--forget", str(tmp_path / f"{name}.jsonl"), "--output", str(tmp_path / name))
        assert evaluate(home, *call) == 0
    call = [verb, "--model", str(home / "base"), "--forget", str(tmp_path / "forget.jsonl"),
            "--retrained", str(tmp_path / "other"), "--output", str(tmp_path / "out")]  # fmt: skip
    if verb == "unlearn":
        call += ["--method", "NPO", *(("--beta", "auto") if log else ("--eval-every", "1"))]
    elif log and verb == "evaluate":
        call = [verb, "--log", str(tmp_path / "forget"), *call[5:]]
    capsys.readouterr()
    scores = "npo_fast.evaluation.evaluate.token_scores"
    monkeypatch.setattr(scores, lambda *_: pytest.fail("it is measured"))
    assert main(call) == 2
    assert "is of other records: the right answer to its record 1 is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_retrained_holdout_log_of_another_size_is_refused_first(home, tmp_path, capsys):
    for name, rows in (("two", FACTS[6:8]), ("three", FACTS[6:9])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    call = ("--forget", str(home / "forget.jsonl"), "--holdout")
    logs = ("--output", str(tmp_path / "logs"))
    assert evaluate(home, *call, str(tmp_path / "two.jsonl"), *logs) == 0
    retrained = ("--retrained", str(tmp_path / "logs"))
    assert evaluate(home, *call, str(tmp_path / "three.jsonl"), *retrained) == 2
    assert "--retrained has 2 holdout items and --holdout 3" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["evaluate", "attack", "unlearn"])
def test_a_retrained_log_without_truth_ratios_is_refused_first(home, tmp_path, capsys, verb):
    retrained = tmp_path / "retrained"
    metrics.save_result({metrics.FORGET: {"avg_gt_loss": [1.0] * 4}}, retrained)
    call = [verb, "--model", str(home / "base"), "--forget", str(home / "forget.jsonl"),
            "--retrained", str(retrained), "--output", str(tmp_path / "out")]  # fmt: skip
    if verb == "unlearn":
        call += ["--method", "NPO", "--eval-every", "1"]
    assert main(call) == 2
    assert "--retrained compares truth ratios of the forget set, and its logs have none" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("truth", "answer", "recall"),
    [
        ("Она живёт в Москве.", "она живёт в Москве", 1.0),
        ("Она живёт в Москве.", "Он живёт в Риме", 0.5),
        ("她住在北京", "她住在南京", 0.8),
        ("AI模型在北京", "AI模型在南京", 5 / 6),
        ("她于1990年出生", "她于1991年出生", 5 / 6),
        ("वह दिल्ली में रहती है", "वह दिल्ली में रहता है", 0.8),
        ("की", "का", 0.0),
        ("क ख", "क \u093f ख", 1.0),  # a vowel sign after a space belongs to no letter
        ("क ख", "कि ख", 0.5),
        ("She lives in Rome.", "she living at rome", 0.75),
        ("Jaime Vásquez wrote it", "Jaime Vasquez wrote it", 0.6),  # TOFU's: v, squez
    ],
)
def test_rouge_reads_words_of_any_script(truth, answer, recall):
    found = rouge_scorer(truth).score(truth, answer)["rougeL"].recall
    assert found == pytest.approx(recall)


def test_rouge_of_tofu_is_the_published_kind(tofu):
    usual = rouge_scorer("an answer")
    for split in ("full", "real_authors", "world_facts"):
        assert all(rouge_scorer(r.answer) is usual for r in load_records(split, str(tofu)))


def test_every_answer_is_tokenised_once(home, monkeypatch):
    encoded = []

    def tokenize(self, record, answer=None):
        encoded.append((record.question, answer or record.answer))
        return original(self, record, answer)

    original = Template.tokenize
    monkeypatch.setattr(Template, "tokenize", tokenize)
    forget = ("--forget", str(home / "forget.jsonl"), "--reference", str(home / "base"))
    assert evaluate(home, *forget) == 0
    assert len(encoded) == len(set(encoded)) == 4 * (1 + 2), "a right and two wrong answers each"


def test_cut_answers_get_a_warning(home):
    with pytest.warns(UserWarning, match="4 of 4 answers are cut to max_length 12"):
        assert evaluate(home, "--forget", str(home / "forget.jsonl"), "--max-length", "12") == 0


def test_cut_wrong_answers_get_a_warning(home, tmp_path):
    rows = [{**row, "perturbed_answer": ["Ben. " * 60, "Ben."]} for row in FACTS[:2]]
    write_jsonl(tmp_path / "forget.jsonl", rows)
    with pytest.warns(UserWarning, match="2 of 4 paraphrased and wrong answers are cut to max_len"):
        assert evaluate(home, "--forget", str(tmp_path / "forget.jsonl"), "--max-length", "60") == 0


def test_a_long_question_in_other_words_is_refused_before_anything_is_measured(
    home, tmp_path, capsys, monkeypatch
):
    rows = [{**row, "paraphrased_question": "Who? " * 9**i} for i, row in enumerate(FACTS[:4])]
    write_jsonl(tmp_path / "forget.jsonl", rows)
    scores = "npo_fast.evaluation.evaluate.token_scores"
    monkeypatch.setattr(scores, lambda *_: pytest.fail("it is measured"))
    forget = ("--forget", str(tmp_path / "forget.jsonl"), "--paraphrased-questions")
    assert evaluate(home, *forget, "--max-length", "60") == 2
    assert "paraphrased question: record 3: its prompt alone has" in capsys.readouterr().err


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reference_with_another_vocabulary_is_refused(home, tmp_path, capsys):
    forget = ("--forget", str(home / "forget.jsonl"))
    reference = tmp_path / "reference"
    save_tiny_model(reference)
    call = (*forget, "--reference", str(reference))

    file = reference / "tokenizer.json"
    tokens = json.loads(file.read_text())
    vocabulary = tokens["model"]["vocab"]
    used = max(load_template(home).encode_all(load_records(forget[1]))[0][0].input_ids)
    text = next(t for t, i in vocabulary.items() if i == used)
    other = next(t for t, i in vocabulary.items() if i == used - 1)
    vocabulary[text], vocabulary[other] = used - 1, used
    file.write_text(json.dumps(tokens))
    assert evaluate(home, *call) == 2
    assert "has another vocabulary than the model: its token" in capsys.readouterr().err

    for name in reference.glob("*token*"):
        name.unlink()
    assert evaluate(home, *call) == 0, "a reference may come without a tokenizer"

    size = json.loads((reference / "config.json").read_text())["vocab_size"]
    wide = tiny_model("Llama", vocab_size=size + 8, pad_token_id=1, eos_token_id=0)
    wide.save_pretrained(reference)
    assert evaluate(home, *call) == 2
    assert "KL compares models with the same tokens" in capsys.readouterr().err


def test_what_is_no_log_is_refused(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"status": "finished", "steps": 3}')
    assert main(["evaluate", "--log", str(tmp_path / "run.json")]) == 2
    assert "is not an evaluation log: it holds status, steps" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["generation_batch", "max_new_tokens", "micro_batch_tokens"])
def test_sizes_are_at_least_one(name):
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        EvaluationSettings(**{name: 0})
