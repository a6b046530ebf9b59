"""MUSE's measures are those of its code, and its layout is read in every form."""

import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from npo_fast import (
    MethodOptions,
    ModelOptions,
    TrainSettings,
    evaluate,
    finetune,
    metrics,
    unlearn,
)
from npo_fast.cli import main
from npo_fast.data import load_records
from npo_fast.evaluation.muse import muse_suite
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.experiments.muse import make_corpus, new_student
from npo_fast.metrics import muse
from npo_fast.metrics.memorization import Conventions
from npo_fast.runs import ReportOptions
from tests.helpers import FACTS, read_jsonl, write_jsonl

SHORT = EvaluationSettings(max_new_tokens=12, generation_batch=5)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus, a model of its words with random weights, and its logs."""
    folder = tmp_path_factory.mktemp("muse")
    make_corpus(folder / "news", seed=3, articles=2)
    lm, tokenizer = new_student(folder / "news")
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(3)
    lm.model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder, lm, tokenizer


@pytest.fixture(scope="module")
def scores(home):
    folder, lm, tokenizer = home
    return evaluate(
        lm, suite="muse", data=folder / "news", tokenizer=tokenizer, evaluation=SHORT,
        output=folder / "eval",
    )  # fmt: skip


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    lengths = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, j in np.ndindex(len(a), len(b)):
        best = max(lengths[i, j + 1], lengths[i + 1, j])
        lengths[i + 1, j + 1] = lengths[i, j] + 1 if a[i] == b[j] else best
    return lengths[-1, -1]


def f1(truth: str, text: str) -> float:
    """ROUGE-L F1 of words of letters and digits, not stemmed."""
    a, b = (
        "".join(c if c.isascii() and c.isalnum() else " " for c in t.lower()).split()
        for t in (truth, text)
    )
    common = longest_common_subsequence(a, b) if a and b else 0
    return 2 * common / (len(a) + len(b)) if common else 0.0


def greedy(home, prompt: str, new_tokens: int) -> str:
    """transformers' continuation of one prompt, without a batch and without padding."""
    _, lm, tokenizer = home
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad(), lm.generating() as model:
        out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=1)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# --- measures -------------------------------------------------------------------------------------


def test_verbmem_is_the_unstemmed_rouge_l_f1_of_greedy_continuations(home, scores):
    folder, _, tokenizer = home
    rows = read_jsonl(folder / "news" / "verbmem" / "forget.jsonl")
    truths = [tokenizer.decode(tokenizer(row["gt"]).input_ids[:12]) for row in rows]
    texts = [greedy(home, row["prompt"], 12) for row in rows]
    log = scores.logs[muse.VERBMEM]
    expected = [[r["prompt"], *pair] for r, *pair in zip(rows, texts, truths, strict=True)]
    assert log["generated_text"] == expected
    assert log["rougeL_f1"] == pytest.approx(
        [f1(*each) for each in zip(truths, texts, strict=True)]
    )
    assert scores["VerbMem forget"] == pytest.approx(np.mean(log["rougeL_f1"]))


def test_f1_is_that_of_words_as_they_are_written():
    from npo_fast.evaluation.rouge import rouge_scorer

    pairs = [
        ("The cats were running home", "A cat was running to its home"),
        ("£55,000 in 1972", "in 1972 it was 55,000"),
        ("Sarah Bentley", "sarah bentley's"),
        ("19%", "none"),
    ]
    scored = [rouge_scorer(a, stem=False).score(a, b)["rougeL"].fmeasure for a, b in pairs]
    assert scored == pytest.approx([f1(a, b) for a, b in pairs])
    assert scored[0] == pytest.approx(4 / 12)  # running, home: with stems the cat would count


def test_knowmem_asks_after_the_examples_and_reads_the_answer_up_to_a_blank_line(home, scores):
    folder, *_ = home
    for name in ("forget_qa", "retain_qa"):
        shots = read_jsonl(folder / "news" / "knowmem" / f"{name}_icl.jsonl")
        rows = read_jsonl(folder / "news" / "knowmem" / f"{name}.jsonl")
        before = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in shots)
        log = scores.logs[f"knowmem/{name}"]
        for row, (prompt, text, truth), score in zip(
            rows, log["generated_text"], log["rougeL_f1"], strict=True
        ):
            assert (prompt, truth) == (
                f"{before}Question: {row['question']}\nAnswer: ",
                row["answer"],
            )
            assert text == greedy(home, prompt, 12).partition("\n\n")[0].partition("Question:")[0]
            assert score == pytest.approx(f1(truth, text))


def test_an_answer_ends_where_another_question_begins():
    from npo_fast.evaluation.muse import _answer

    for more in ("\n\nThe", "\nQuestion: Who?", " Question: Who?", "\nQuestions"):
        assert _answer(f"Ada Voss{more}").strip() == "Ada Voss"


def test_privleak_takes_the_least_likely_two_fifths_of_a_text(home, scores):
    folder, lm, tokenizer = home
    for name in (muse.PRIVLEAK_FORGET, muse.PRIVLEAK_HOLDOUT):
        expected = []
        for row in read_jsonl(folder / "news" / f"{name}.jsonl"):
            ids = tokenizer(row["text"], return_tensors="pt").input_ids
            with torch.no_grad(), lm.generating() as model:
                log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
            own = log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sort().values
            expected.append(own[: int(0.4 * len(own))].mean().item())
        assert scores.logs[name]["min_k"] == pytest.approx(expected, rel=1e-4)
        assert scores.logs[name]["conventions"]["min_k_share"] == 0.4


def leak_logs(forget, holdout) -> dict:
    entry = Conventions(min_k_share=0.4).entry()
    sets = {muse.PRIVLEAK_FORGET: forget, muse.PRIVLEAK_HOLDOUT: holdout}
    return {name: {"min_k": list(values), "conventions": entry} for name, values in sets.items()}


def test_the_auc_counts_holdout_texts_that_are_likelier_than_forget_texts():
    rng = np.random.default_rng(0)
    forget, holdout = rng.normal(size=7).round(1), rng.normal(0.5, size=9).round(1)
    pairs = [float(h > f) + 0.5 * float(h == f) for h in holdout for f in forget]
    assert muse.privleak_auc(leak_logs(forget, holdout)) == pytest.approx(np.mean(pairs))
    assert muse.privleak_auc(leak_logs([-1, -2], [-3, -4])) == 0  # it knows the forget texts
    assert (
        muse.privleak_auc(leak_logs([-3, -4], [-1, -2])) == 1
    )  # they are unlikely: over-forgotten


def test_privleak_is_the_change_of_the_auc_against_a_retrained_model_in_percent():
    retrained = leak_logs([-1, -3], [-2, -2])  # 0.5
    for (forget, holdout), expected in {
        ((-1, -2), (-3, -4)): -100, ((-3, -4), (-1, -2)): 100, ((-1, -3), (-2, -2)): 0,
    }.items():  # fmt: skip
        assert muse.summary(leak_logs(forget, holdout), retrained)["PrivLeak, %"] == expected


def test_without_a_retrained_model_there_is_an_auc_and_no_privleak(scores):
    assert "AUC, holdout above forget, min-k" in scores
    assert "PrivLeak, %" not in scores
    assert scores.verdict.outcome == "undecided"
    assert "--retrained" in scores.verdict.advice
    assert set(scores.intervals) == set(scores)


def test_long_texts_are_read_in_windows_that_predict_every_token_once(home, tmp_path):
    folder, lm, tokenizer = home
    shutil.copytree(folder / "news", tmp_path / "news")
    texts = [row["text"] for row in read_jsonl(folder / "news" / "raw" / "forget.jsonl")]
    write_jsonl(tmp_path / "news" / "privleak" / "forget.jsonl", [{"text": " ".join(texts)}] * 2)
    long = evaluate(lm, suite="muse", data=tmp_path / "news", tokenizer=tokenizer,
                    evaluation=EvaluationSettings(generate=False))  # fmt: skip
    tokens = len(tokenizer(" ".join(texts)).input_ids)
    assert tokens > lm.model.config.max_position_embeddings
    assert long.logs[muse.PRIVLEAK_FORGET]["num_token_gt"] == [tokens - 1] * 2
    assert set(long.logs) == {muse.PRIVLEAK_FORGET, muse.PRIVLEAK_HOLDOUT}


# --- verdict --------------------------------------------------------------------------------------


def whole_logs(verbmem, knowmem, kept, leak) -> dict:
    """Logs with these means, and an AUC of ``leak`` on 20 texts of each set."""
    rouge = {muse.VERBMEM: verbmem, muse.KNOWMEM_FORGET: knowmem, muse.KNOWMEM_RETAIN: kept}
    above = round(20 * leak)
    holdout = [1.0] * above + [-1.0] * (20 - above)
    return {k: {"rougeL_f1": [v] * 3} for k, v in rouge.items()} | leak_logs([0.0] * 20, holdout)


@pytest.mark.parametrize(
    ("after", "width", "outcome"),
    [
        ((0.2, 0.28, 0.6, 0.5), 0.01, "forgotten"),
        ((0.5, 0.28, 0.6, 0.5), 0.01, "not forgotten"),
        ((0.25, 0.28, 0.6, 0.5), 0.1, "forgotten"),
        ((0.2, 0.5, 0.6, 0.5), 0.01, "not forgotten"),
        ((0.2, 0.28, 0.6, 0.1), 0.01, "not forgotten"),
        ((0.1, 0.2, 0.6, 0.9), 0.01, "over-forgotten"),
        ((0.1, 0.2, 0.6, 0.9), 0.5, "forgotten"),
        ((0.0, 0.0, 0.1, 0.9), 0.01, "collapsed"),
    ],
)
def test_the_verdict_follows_the_four_criteria_where_intervals_leave_no_doubt(
    after, width, outcome
):
    logs, retrained = whole_logs(*after), whole_logs(0.2, 0.3, 0.6, 0.5)
    ours = muse.measures(logs)
    between = {key: (value - width, value + width) for key, value in ours.items()}
    before = muse.measures(whole_logs(0.9, 0.7, 0.6, 0.0))
    for model_before in ({}, before):
        verdict = muse.verdict(logs, retrained, model_before, between)
        assert verdict.outcome == outcome, verdict


@pytest.mark.parametrize("missing", [(muse.VERBMEM,), (muse.VERBMEM, muse.KNOWMEM_FORGET)])
def test_a_retrained_log_that_lacks_a_criterion_leaves_it_undecided(missing):
    """Not forgotten: a model that recites everything would be."""
    logs, retrained = whole_logs(1.0, 1.0, 1.0, 0.5), whole_logs(0.2, 0.3, 0.6, 0.5)
    for name in missing:
        del retrained[name]
    between = {key: (value, value) for key, value in muse.measures(logs).items()}
    verdict = muse.verdict(logs, retrained, {}, between)
    known = muse.KNOWMEM_FORGET not in missing
    assert verdict.outcome == ("not forgotten" if known else "undecided")
    assert known or "have no VerbMem forget and no KnowMem forget" in verdict.advice


def test_without_continuations_and_a_retrained_model_the_verdict_has_the_auc():
    verdict = muse.verdict(leak_logs([0.0] * 9, [1.0] * 9), None, {}, {})
    assert verdict.outcome == "undecided"
    assert verdict.reasons == ("AUC, holdout above forget, min-k 1",)


def test_fewer_than_ten_texts_have_no_say_on_the_auc():
    logs, retrained = (leak_logs([0.0] * 9, [value] * 9) for value in (1.0, -1.0))
    retrained[muse.PRIVLEAK_HOLDOUT]["min_k"][0] = 1.0
    assert muse.verdict(logs, retrained, {}, {"privleak_auc": (1.0, 1.0)}).outcome == "forgotten"


# --- data -----------------------------------------------------------------------------------------


def test_the_layout_is_read_as_the_hub_and_as_people_write_it(home, tmp_path):
    folder, *_ = home
    suite = muse_suite(str(folder / "news"))
    for file in (folder / "news").rglob("*.jsonl"):
        rows, place = read_jsonl(file), file.relative_to(folder / "news").with_suffix("")
        for form in ("hub", "json"):
            (tmp_path / form / place).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"hub/{place}-00000-of-00001.parquet")
        (tmp_path / "json" / f"{place}.json").write_text(json.dumps(rows))
    for form in ("hub", "json"):
        assert muse_suite(str(tmp_path / form)) == suite
        raw = load_records("raw/forget", str(tmp_path / form))
        assert raw == load_records("raw/forget", str(folder / "news"))
        assert all(record.is_text for record in raw)


def test_the_hub_is_asked_for_configuration_and_split(home, tmp_path, monkeypatch):
    """As the card of ``muse-bench/MUSE-News`` lays them out, read by ``datasets``."""
    folder, *_ = home
    shutil.copytree(folder / "news", tmp_path / "snapshot")
    splits: dict[str, list[str]] = {}
    for file in sorted((folder / "news").rglob("*.jsonl")):
        splits.setdefault(file.parent.name, []).append(file.stem)
    lines = ["---", "configs:"]
    for name, stems in splits.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [f"  - split: {s}\n    path: {name}/{s}.jsonl" for s in stems]
    (tmp_path / "snapshot" / "README.md").write_text("\n".join([*lines, "---", ""]))
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *given, **more: load(
            {"muse-bench/MUSE-News": str(tmp_path / "snapshot")}[name], *given, **more,
            cache_dir=str(tmp_path / "cache"),
        ),
    )  # fmt: skip
    assert muse_suite("muse-bench/MUSE-News") == muse_suite(str(folder / "news"))
    raw = load_records("raw/retain1[:3]", "muse-bench/MUSE-News")
    assert raw == load_records("raw/retain1[:3]", str(folder / "news"))


def test_texts_may_be_a_json_list_as_the_benchmark_saves_them(home, tmp_path):
    folder, *_ = home
    shutil.copytree(folder / "news", tmp_path / "news")
    file = tmp_path / "news" / "privleak" / "holdout.jsonl"
    texts = [row["text"] for row in read_jsonl(file)]
    file.with_suffix(".json").write_text(json.dumps(texts))
    file.unlink()
    assert muse_suite(str(tmp_path / "news")) == muse_suite(str(folder / "news"))


def test_the_corpus_is_a_function_of_its_seed_and_its_folds_are_those_of_muse(home, tmp_path):
    folder, *_ = home
    news = folder / "news"
    for name, seed in (("same", 3), ("other", 4)):
        make_corpus(tmp_path / name, seed, articles=2)
    files = {file.relative_to(news) for file in news.rglob("*.jsonl")}
    assert len(files) == 23
    for name in files:
        text = (news / name).read_text()
        assert (tmp_path / "same" / name).read_text() == text
        assert (tmp_path / "other" / name).read_text() != text
    sust, scal = ([read_jsonl(news / kind / f"forget_{i}.jsonl") for i in range(1, 5)]
                  for kind in ("sust", "scal"))  # fmt: skip
    assert (
        [row for fold in sust for row in fold] == scal[3] == read_jsonl(news / "train/forget.jsonl")
    )
    assert all(scal[i] == scal[i - 1] + sust[i] for i in (1, 2, 3))
    assert scal[0] == sust[0] == read_jsonl(news / "raw/forget.jsonl")
    asked = {row["question"] for row in read_jsonl(news / "knowmem/forget_qa.jsonl")}
    assert not asked & {row["question"] for row in read_jsonl(news / "knowmem/forget_qa_icl.jsonl")}
    unseen = {row["text"] for row in read_jsonl(news / "raw/holdout.jsonl")}
    assert not unseen & {row["text"] for row in scal[3]}


# --- the command ----------------------------------------------------------------------------------


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        code = main(["evaluate", *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_logs_are_saved_read_again_and_compared_with(home, scores, capsys):
    folder, *_ = home
    saved = metrics.load_result(folder / "eval")
    assert saved == json.loads((folder / "eval" / "muse_eval.json").read_text()) == scores.logs
    code, out, _ = run(capsys, "--suite", "muse", "--log", folder / "eval", "--retrained",
                       folder / "eval" / "muse_eval.json", "--json")  # fmt: skip
    result = json.loads(out)
    assert code == 0
    assert result["metrics"] == {**scores, "PrivLeak, %": 0.0}
    assert result["verdict"]["outcome"] == "forgotten"
    assert result["examples"] == {name: len(muse_suite_sizes(folder)[name]) for name in scores.logs}


def muse_suite_sizes(folder) -> dict:
    suite = muse_suite(str(folder / "news"))
    return suite.prompts | suite.texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "muse", "--model", "base"], "--suite muse takes its sets from --data"),
        (["--suite", "muse", "--data", "news"], "say which --model to evaluate"),
        (["--suite", "muse", "--model", "base", "--data", "tofu"],
         "--suite muse reads verbmem/forget, rows of prompt and gt, and --data"),
        (["--suite", "muse", "--model", "base", "--data", "half"],
         "--suite muse reads knowmem/retain_qa_icl, rows of question and answer"),
        (["--suite", "muse", "--model", "base", "--data", "odd"],
         "record 2: --suite muse needs the text 'gt' in each row of verbmem/forget"),
        (["--suite", "muse", "--model", "base", "--data", "news", "--forget", "raw/forget"],
         "--suite muse: leave out --forget"),
        (["--suite", "muse", "--model", "base", "--data", "news", "--max-length", "64"],
         "--suite muse: leave out --max-length, for it measures whole texts"),
        (["--suite", "muse", "--model", "base", "--data", "news", "--no-utility"],
         "--suite muse: leave out --no-utility"),
        (["--suite", "muse", "--model", "base", "--data", "news", "--max-new-tokens", "500"],
         "tokens of the model's context"),
        (["--suite", "muse", "--log", "tofu-log"], "--log holds no logs of MUSE"),
        (["--log", "eval"], "--log holds logs of MUSE: add --suite muse"),
        (["--model", "base", "--data", "tofu", "--forget", "facts", "--retrained", "eval"],
         "--retrained holds logs of MUSE: add --suite muse"),
        (["--suite", "muse", "--log", "eval", "--retrained", "other-k"],
         "--retrained took min-k with k = 0.2, and this evaluation 0.4"),
        (["--suite", "muse", "--log", "eval", "--retrained", "never-forgot"],
         "it was trained on the forget set"),
        (["--suite", "muse", "--log", "eval", "--retrained", "fewer"],
         "--retrained has 1 texts of privleak/forget, and this evaluation 4"),
        (["--suite", "muse", "--log", "eval", "--retrained", "fewer-questions"],
         "--retrained has 1 texts of knowmem/forget_qa, and this evaluation "),
        (["--suite", "muse", "--log", "no-holdout", "--retrained", "eval"],
         "the log has no privleak/holdout"),
        (["--suite", "mues", "--model", "base", "--data", "news"], "muse"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_in_one_line(
    home, scores, capsys, tmp_path, arguments, message, monkeypatch
):
    folder, *_ = home
    monkeypatch.chdir(tmp_path)
    for name in ("base", "news", "eval"):
        (tmp_path / name).symlink_to(folder / name)
    write_jsonl(tmp_path / "facts.jsonl", FACTS)
    (tmp_path / "tofu").mkdir()
    write_jsonl(tmp_path / "tofu" / "facts.jsonl", FACTS)
    for name in ("half", "odd"):
        shutil.copytree(folder / "news", tmp_path / name)
    (tmp_path / "half" / "knowmem" / "retain_qa_icl.jsonl").unlink()
    write_jsonl(
        tmp_path / "odd" / "verbmem" / "forget.jsonl", [{"prompt": "a", "gt": "b"}, {"prompt": "a"}]
    )
    (tmp_path / "tofu-log").write_text(json.dumps({"eval_log.json": {"avg_gt_loss": [1.0]}}))
    logs = json.loads((folder / "eval" / "muse_eval.json").read_text())
    usual = {"conventions": Conventions().entry()}
    for name, changed in {
        "other-k": {muse.PRIVLEAK_FORGET: logs[muse.PRIVLEAK_FORGET] | usual},
        "never-forgot": leak_logs([-1, -2] * 2, [-3, -4] * 2),
        "fewer": leak_logs([-1], [-3]),
        "fewer-questions": {muse.KNOWMEM_FORGET: {"rougeL_f1": [0.0]}},
    }.items():  # fmt: skip
        (tmp_path / name).write_text(json.dumps(logs | changed))
    del logs[muse.PRIVLEAK_HOLDOUT]
    (tmp_path / "no-holdout").write_text(json.dumps(logs))
    code, _, err = run(capsys, *arguments)
    assert code == 2
    line = err.strip().splitlines()[-1]
    assert line.startswith("npo-fast: error: ")
    assert message in line


# --- end to end -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_measure_sees_that_articles_were_unlearnt_and_that_a_small_model_paid_for_it(
    tmp_path,
):
    news = tmp_path / "news"
    make_corpus(news, seed=0, articles=5)
    lm, tokenizer = new_student(news)
    untaught = {name: value.clone() for name, value in lm.model.state_dict().items()}
    common = {"tokenizer": tokenizer, "loading": ModelOptions(template="plain")}

    def teach(*names: str) -> None:
        lm.model.load_state_dict(untaught)
        records = [record for name in names for record in load_records(f"raw/{name}", str(news))]
        finetune(lm, train=records, output=tmp_path / "-".join(names),
                 training=TrainSettings(epochs=20, lr=3e-3, batch_size=4, warmup_steps=20),
                 **common)  # fmt: skip

    def measured(name: str, **more):
        return evaluate(
            lm, suite="muse", data=news, output=tmp_path / name, tokenizer=tokenizer, **more
        )

    teach("retain1", "retain2")
    retrained = measured("retrained")
    teach("retain1", "retain2", "forget")
    before = measured("before", retrained=retrained)
    unlearn(lm, data=news, forget="raw/forget", retain="raw/retain1", output=tmp_path / "npo",
            method=MethodOptions("NPO+RT", beta=0.01),
            training=TrainSettings(epochs=8, lr=1e-3, batch_size=4),
            report=ReportOptions(no_report=True), **common)  # fmt: skip
    after = measured("after", retrained=tmp_path / "retrained", original=before)
    assert retrained["KnowMem forget"] < 0.3 < before["KnowMem forget"]
    assert before["PrivLeak, %"] < -80
    assert after["VerbMem forget"] < 0.6 * before["VerbMem forget"]
    assert after["KnowMem forget"] < 0.6 * before["KnowMem forget"]
    assert after["PrivLeak, %"] > before["PrivLeak, %"] + 50
    assert before.verdict.outcome == "not forgotten"
    assert after["KnowMem retain"] < 0.5 * before["KnowMem retain"]  # asked of retain2
    assert after.verdict.outcome == "collapsed"
