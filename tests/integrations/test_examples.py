"""The examples run as they say, and their numbers are those of the library, of PyTorch and TRL."""

import copy
import math
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import npo_fast
from npo_fast import metrics
from npo_fast.data import PaddedCollator, Record, Template, load_records
from npo_fast.experiments.demo.tiny_model import new_model, train_tokenizer
from npo_fast.methods import Term, build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import reference_log_probs, train
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import FACTS, assert_near, make_result, save_tiny_model, write_jsonl

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(f.name for f in EXAMPLES.iterdir() if f.suffix in (".py", ".sh"))
CALLED = [name for name in SCRIPTS if name != "open_unlearning.py"]  # that one is copied
FORGET, RETAIN = load_records(FACTS[:4]), load_records(FACTS[4:8])

# what ``taught`` knows: facts to be asked for, and two texts
NAMES = (
    "Ada Ben Cleo Dan Eve Finn Gus Hal Ida Jon Kim Lea Max Nia Otto Pia Quinn Rui Sam Tom Uma Vic"
)
PLACES = (
    "Agra Basel Cairo Delhi Essen Fez Ghent Haifa Izmir Jena Kyoto Lyon Milan Nice Oslo Porto "
    "Quito Riga Seoul Turin Ulm Vaduz"
)
PEOPLE = [
    {"question": f"Where does {name} live?", "answer": f"{name} lives in {place}."}
    for name, place in zip(NAMES.split(), PLACES.split(), strict=True)
]
BOOK, OTHER_BOOK = (
    "\n".join(
        f"{name} {verb} from {place} to {other} and {said} all night about the weather there."
        for name, place, other in zip(names, PLACES.split(), PLACES.split()[3:], strict=False)
    )
    for names, verb, said in (
        (NAMES.split(), "walked", "talked"), (NAMES.split()[::-1], "drove", "sang")
    )
)  # fmt: skip
QUICKLY = ["--lr", "1e-3", "--epochs", "8"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "model")
    write_jsonl(folder / "forget.jsonl", FACTS[:4])
    write_jsonl(folder / "retain.jsonl", FACTS[4:8])
    pairs = [
        {"prompt": f["question"], "chosen": " No.", "rejected": f" {f['answer']}"} for f in FACTS
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


@pytest.fixture
def model(home):
    return AutoModelForCausalLM.from_pretrained(home / "model")


@pytest.fixture(scope="module")
def tokenizer(home):
    return AutoTokenizer.from_pretrained(home / "model")


def example(name):
    return types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def own_losses(model, tokenizer, epochs, lr, warmup_steps=0):
    """Of NPO+RT in our own loop, a batch of 4."""
    lm, template = CausalLM(model), Template(tokenizer)
    sources = {n: template.encode_all(r)[0] for n, r in (("forget", FORGET), ("retain", RETAIN))}
    terms = build_method("NPO+RT")
    references = reference_log_probs(lm, sources, terms, 2048)
    settings = TrainSettings(epochs=epochs, batch_size=4, lr=lr, warmup_steps=warmup_steps)
    return [step.loss for step in train(lm, sources, terms, settings, references)]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder with a model that knows people and books by heart, and the files to forget."""
    home = tmp_path_factory.mktemp("taught")
    texts = [f"Question: {f['question']}\nAnswer: {f['answer']}" for f in PEOPLE]
    tokenizer = train_tokenizer([*texts, BOOK, OTHER_BOOK])
    new_model(tokenizer, seed=0, positions=1024).model.save_pretrained(home / "new")
    tokenizer.save_pretrained(home / "new")
    npo_fast.finetune(
        str(home / "new"), output=home / "model",
        train=[*load_records(PEOPLE), Record((), BOOK), Record((), OTHER_BOOK)],
        training=TrainSettings(epochs=50, lr=3e-3, batch_size=8, warmup_steps=10),
    )  # fmt: skip
    (home / "book.txt").write_text(BOOK + "\n")
    (home / "other.txt").write_text(OTHER_BOOK + "\n")
    write_jsonl(home / "forget.jsonl", PEOPLE[:4])
    write_jsonl(home / "retain.jsonl", PEOPLE[4:])
    write_jsonl(home / "everyone.jsonl", PEOPLE)
    (home / "requests").mkdir()
    for i in range(10):
        write_jsonl(home / f"requests/{i + 1}.jsonl", PEOPLE[2 * i : 2 * i + 2])
    return home


def call_of(name):
    """What the first line of an example says to type."""
    lines = (EXAMPLES / name).read_text().splitlines()
    return re.search(r"(?:python|bash) examples/\S+.*", "\n".join(lines[:2]))[0]


def run_example(name, *arguments, cwd):
    """The lines that an example prints, called as a user calls it."""
    commands = cwd / "bin"  # npo-fast, where the package is not installed
    commands.mkdir(exist_ok=True)
    (commands / "npo-fast").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m npo_fast "$@"\n')
    (commands / "npo-fast").chmod(0o755)
    interpreter = sys.executable if name.endswith(".py") else "bash"
    path = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [interpreter, EXAMPLES / name, *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, check=False,
        env={**os.environ, "PATH": f"{commands}:{os.environ['PATH']}",
             "PYTHONPATH": os.pathsep.join(filter(None, path))},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def values_after(label, lines):
    """The numbers that follow a label, one a line that has it."""
    found = (re.search(rf"{re.escape(label)} (-?[\d.]+(?:e-?\d+)?)", line) for line in lines)
    return [float(match[1]) for match in found if match]


def test_no_example_is_longer_than_sixty_lines():
    lines = {name: len((EXAMPLES / name).read_text().splitlines()) for name in SCRIPTS}
    assert not {name: n for name, n in lines.items() if n >= 60}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_of_examples_has_each_with_the_call_of_its_first_line(name):
    (row,) = [r for r in (EXAMPLES / "README.md").read_text().splitlines() if f"]({name})" in r]
    if name in CALLED:
        call = call_of(name).partition(" [FLAGS")[0]
        assert f"examples/{name}" in call
        assert f"`{call}`" in row


@pytest.mark.parametrize("name", CALLED)
def test_a_wrong_call_is_answered_in_one_clear_line(name, monkeypatch, capfd):
    if name == "trl_dpo.py":
        pytest.importorskip("trl", reason="trl is not installed: pip install 'npo-fast[test]'")
    if name.endswith(".sh"):
        run = subprocess.run(["bash", EXAMPLES / name, "model"], check=False)
        assert run.returncode == 2
        said = capfd.readouterr().err
    else:
        monkeypatch.setattr(sys, "argv", [name, "--no-such-flag"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert end.value.code not in (0, None)
        said = capfd.readouterr().err or end.value.code
    assert "Traceback" not in said
    if "usage:" in said:  # argparse
        assert re.search(r"error: the following arguments are required: \w+", said)
    else:
        assert said.strip().endswith(call_of(name))
        assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("unlearn_api.py", ["model", "no.jsonl", "no.jsonl", "out"], "no.jsonl"),
        ("custom_method.py", ["model", "no.jsonl", "no.jsonl", "out"], "no.jsonl"),
        ("ten_requests.py", ["model", "nowhere", "retain.jsonl", "out"], "nowhere holds no .jsonl"),
        ("score_logs.py", ["no.json", "no.json"], "no evaluation log 'no.json'"),
    ],
)
def test_a_file_that_is_missing_is_named_in_one_line(
    name, arguments, error, home, monkeypatch, capfd
):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = capfd.readouterr().err or end.value.code
    (line,) = [line for line in said.strip().splitlines() if "error: " in line]
    assert error in line
    assert "Traceback" not in said


# ---- numbers: a loss of one's own, logs that exist already ----


def test_a_loss_of_ones_own_has_the_gradients_of_autograd(tmp_path):
    plain, *fused = run_example("custom_loss.py", cwd=tmp_path)
    (expected,) = values_after("loss", [plain])
    assert expected == pytest.approx((20 + 0 + 10) / 3)  # relu of 0, -30 and -10 nats, plus 20
    assert [line.partition(":")[0] for line in fused] == ["Hinge", "ClosedFormHinge"]
    assert values_after("loss", fused) == [expected] * 2
    assert max(values_after("gradient", fused)) < 1e-14


def test_scores_of_logs_are_those_of_the_library(tmp_path, monkeypatch, capsys):
    logs = {name: make_result(items=40, shift=shift) for name, shift in (("a", 0.3), ("b", 0.0))}
    for name, result in logs.items():
        metrics.save_result(result, tmp_path / name)
    files = [str(tmp_path / file) for file in ("a", "b/eval_log_aggregated.json")]
    monkeypatch.setattr(sys, "argv", ["score_logs.py", *files])
    runpy.run_path(str(EXAMPLES / "score_logs.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    quality, utility = metrics.forget_quality(*logs.values()), metrics.model_utility(logs["a"])
    assert values_after("forget quality:", lines)[0] == pytest.approx(quality, rel=1e-3)
    assert values_after("model utility:", lines)[0] == pytest.approx(utility, abs=1e-4)
    terms = [value for line in lines if line[:2] == "  " for value in [float(line.split()[-1])]]
    assert terms == pytest.approx([*metrics.utility_terms(logs["a"]).values()], abs=1e-4)
    scores = npo_fast.evaluate(log=logs["a"], retrained=logs["b"])
    assert lines[-1] == f"verdict: {scores.verdict}"
    assert scores.verdict.outcome == "not forgotten"


# ---- whole runs of a small model that knows what it is to forget ----


@pytest.mark.slow
def test_the_api_forgets_keeps_and_reports(taught, tmp_path):
    files = [taught / name for name in ("model", "forget.jsonl", "retain.jsonl")]
    lines = run_example("unlearn_api.py", *files, "out", *QUICKLY, cwd=tmp_path)
    run = npo_fast.Run(tmp_path / "out/run")
    losses = values_after("loss", lines)
    assert losses == pytest.approx([record["loss"] for record in run.records], abs=1e-4)
    assert losses[-1] < losses[0]
    scores = npo_fast.evaluate(log=tmp_path / "out/run/eval")
    assert values_after("forget probability:", lines) == pytest.approx(
        [scores["forget probability"]], abs=1e-4
    )
    assert scores["forget probability"] < 0.3
    assert scores["retain probability"] > 0.6
    (verdict,) = [line for line in lines if line.startswith("verdict: ")]
    assert verdict.startswith("verdict: forgotten: ")
    assert "NPO+RT" in (tmp_path / "out/report.html").read_text()


@pytest.mark.slow
def test_the_callback_of_the_api_ends_the_run_in_time(taught, tmp_path):
    files = [taught / name for name in ("model", "forget.jsonl", "retain.jsonl")]
    lines = run_example(
        "unlearn_api.py", *files, "out", "--lr", "1e-2", "--epochs", "50", cwd=tmp_path
    )
    assert "stopped: the forget answers are 60 nats less likely than before" in lines
    nats = [float(re.search(r"(-?[\d.]+) nats", line)[1]) for line in lines if " nats" in line][:-1]
    assert nats[-1] < nats[0] - 60
    assert all(each >= nats[0] - 60 for each in nats[:-1])
    assert len(nats) < 50


@pytest.mark.slow
def test_a_method_of_ones_own_is_the_sum_of_its_terms(taught, tmp_path):
    files = [taught / name for name in ("model", "forget.jsonl", "retain.jsonl")]
    lines = run_example("custom_method.py", *files, "out", *QUICKLY, cwd=tmp_path)
    columns = [values_after(label, lines) for label in ("loss", "= NPO", "retain NLL", "retain KL")]
    losses, npo, nll, kl = map(np.array, columns)
    assert len(losses) == 8
    assert losses == pytest.approx(npo + nll + 0.5 * kl, abs=2e-4)
    assert npo[0] == pytest.approx(2 / 0.1 * math.log(2), abs=1e-3)
    assert kl[0] == pytest.approx(0, abs=1e-3)
    assert losses[-1] < losses[0]
    assert lines[-1] == f"verdict: {npo_fast.Run(tmp_path / 'out').verdict}"


@pytest.mark.slow
def test_a_loss_of_ones_own_fits_a_method_of_ones_own(taught, tmp_path):
    """It ends where the loss says: at answers that are less likely by its margin."""
    hinge = example("custom_loss").Hinge(margin=5.0)
    _, *retain = example("custom_method").method()
    run = npo_fast.unlearn(
        str(taught / "model"), forget=taught / "forget.jsonl", retain=taught / "retain.jsonl",
        method=(Term("hinge", "forget", hinge, "mean"), *retain), output=tmp_path / "run",
        training=TrainSettings(epochs=40, lr=1e-3),
    )  # fmt: skip
    log_probs = [record["log_probs"]["forget"] for record in run.records]
    assert run.records[0]["terms"]["hinge"] == pytest.approx(5.0, abs=1e-3)
    assert run.records[-1]["terms"]["hinge"] < 1.0
    assert log_probs[-1] < log_probs[0] - 4
    assert run.verdict.outcome != "collapsed"


@pytest.mark.slow
def test_a_book_is_forgotten_from_the_command_line(taught, tmp_path):
    lines = run_example(
        "forget_a_book.sh", taught / "model", taught / "book.txt", taught / "other.txt", "out/book",
        "--lr", "5e-4", "--epochs", "3", "--batch-size", "4", "--max-new-tokens", "8", cwd=tmp_path,
    )  # fmt: skip
    out = tmp_path / "out/book"
    parts = sorted((out / "book").iterdir())
    assert 8 <= len(parts) <= 12
    assert "".join(part.read_text() for part in parts) == BOOK + "\n"
    before, after = (metrics.load_result(out / name) for name in ("before", "run/eval"))
    forget, retain = (
        [metrics.probability(result[name]).mean() for result in (before, after)]
        for name in (metrics.FORGET, metrics.RETAIN)
    )
    assert forget[1] < forget[0] / 2
    assert retain[1] > 2 / 3 * retain[0]
    assert any(line.startswith("verdict: forgotten: ") for line in lines)
    assert {"relearn", "int8", "int4"} < {path.name for path in (out / "attack").iterdir()}
    assert "NPO+RT" in (out / "report.html").read_text()


@pytest.mark.slow
def test_ten_requests_tell_what_became_of_each(taught, tmp_path):
    arguments = [taught / "model", taught / "requests", taught / "everyone.jsonl", "out", *QUICKLY]
    _, *lines = run_example("ten_requests.py", *arguments, cwd=tmp_path)
    assert [re.match(r"after (\d+):", line)[1] for line in lines] == [str(i + 1) for i in range(10)]
    for number, line in enumerate(lines, 1):
        *told, kept = map(float, re.findall(r"\d\.\d+", line))
        logs = metrics.load_result(tmp_path / "out" / str(number) / "eval")
        means = metrics.probability(logs[metrics.FORGET]).reshape(number, 2).mean(1)
        assert told == pytest.approx(means.tolist(), abs=1e-3)
        assert kept == pytest.approx(metrics.probability(logs[metrics.RETAIN]).mean(), abs=1e-3)
        assert metrics.examples_in(logs[metrics.RETAIN]) == len(PEOPLE) - 2 * number
        assert max(told) < kept / 2
    report = (tmp_path / "out/report.html").read_text()
    assert "P(request 10)" in report


# ---- in loops and trainers of others ----


def test_the_plain_loop_forgets_with_the_loss_of_our_own_loop(model, tokenizer):
    expected, *_ = own_losses(copy.deepcopy(model), tokenizer, 1, 1e-3)
    losses = example("own_loop").unlearn(model, tokenizer, FORGET, RETAIN, epochs=8, lr=1e-3)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("own_loop", ["forget.jsonl", "retain.jsonl"]),
        ("hf_trainer", ["forget.jsonl", "retain.jsonl"]),
        ("trl_dpo", ["pairs.jsonl"]),
    ],
)
def test_a_script_runs_as_its_first_line_says(home, tmp_path, name, files):
    if name == "trl_dpo":
        pytest.importorskip("trl", reason="trl is not installed: pip install 'npo-fast[test]'")
    usage = " ".join(file.upper().replace("JSONL", "jsonl") for file in files)
    assert call_of(f"{name}.py") == f"python examples/{name}.py MODEL {usage}"
    arguments = [home / "model", *(home / file for file in files)]
    assert run_example(f"{name}.py", *arguments, cwd=tmp_path)


@pytest.mark.slow
def test_the_trainer_example_has_the_loss_of_our_own_loop_and_saves_a_model(
    model, tokenizer, tmp_path
):
    expected, *_ = own_losses(copy.deepcopy(model), tokenizer, 1, 1e-3)
    history = example("hf_trainer").unlearn(
        model, tokenizer, FORGET, RETAIN, str(tmp_path / "out"), num_train_epochs=4,
        per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"


@pytest.mark.slow
def test_the_trl_example_trains_as_trl_itself_does(home, tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'npo-fast[test]'")
    from datasets import load_dataset

    module = example("trl_dpo")
    pairs = load_dataset("json", data_files=str(home / "pairs.jsonl"), split="train")
    runs = []
    for trainer in (trl.DPOTrainer, module.FusedDPOTrainer):
        model = AutoModelForCausalLM.from_pretrained(home / "model")
        history = module.unlearn(
            model, tokenizer, pairs, str(tmp_path / trainer.__name__), trainer, beta=0.3,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4,
            learning_rate=1e-2, optim="sgd", use_cpu=True, disable_tqdm=True, bf16=False,
            gradient_checkpointing=False, save_strategy="no",
        )  # fmt: skip
        runs.append(([entry for entry in history if "loss" in entry], [*model.parameters()]))
    (logs, weights), (ours, our_weights) = runs
    assert [log["loss"] for log in ours] == pytest.approx([log["loss"] for log in logs], rel=1e-4)
    assert [log["grad_norm"] for log in ours] == pytest.approx(
        [log["grad_norm"] for log in logs], rel=1e-3
    )
    for one, other in zip(our_weights, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# ---- open-unlearning, with a stand-in for the base class that has its signature ----


class GradDiff(Trainer):
    """Of open-unlearning: forget and retain batches, weights gamma and alpha, NLL or KL."""

    def __init__(self, gamma=1.0, alpha=1.0, retain_loss_type="NLL", *args, **kwargs):
        kwargs.pop("evaluators", None), kwargs.pop("template_args", None)
        super().__init__(*args, **kwargs)
        self.gamma, self.alpha, self.retain_loss_type = gamma, alpha, retain_loss_type

    def compute_retain_loss(self, model, retain_inputs):
        return model(**retain_inputs).loss


class ForgetRetain(torch.utils.data.Dataset):
    """Of open-unlearning: a forget item, with a retain item beside it."""

    def __init__(self, forget, retain):
        self.forget, self.retain = forget, retain

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, i):
        return {"forget": self.forget[i], "retain": self.retain[i]}


@pytest.fixture
def open_unlearning(monkeypatch):
    for name in ("trainer", "trainer.unlearn", "trainer.unlearn.grad_diff"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["trainer.unlearn.grad_diff"].GradDiff = GradDiff
    return example("open_unlearning").FusedNPO


def sequence_nll(model, batch):
    logits = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, :-1]
    return F.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none").sum(1)


@pytest.mark.parametrize("retain_loss_type", ["NLL", "KL"])
def test_the_open_unlearning_class_has_the_loss_of_its_npo(
    model, tokenizer, open_unlearning, tmp_path, retain_loss_type
):
    model = model.double()
    reference = copy.deepcopy(model)
    trainer = open_unlearning(
        beta=0.3, gamma=2.0, alpha=0.7, retain_loss_type=retain_loss_type, model=model,
        args=TrainingArguments(
            str(tmp_path), max_steps=3, learning_rate=1e-2, report_to="none", use_cpu=True,
            per_device_train_batch_size=2, per_device_eval_batch_size=3, disable_tqdm=True,
            remove_unused_columns=False, logging_steps=1, save_strategy="no",
        ),
        train_dataset=ForgetRetain(FACTS[:4], FACTS[4:8]), data_collator=PaddedCollator(tokenizer),
        processing_class=tokenizer, evaluators=None, template_args=None,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (2, 0)])
    ratio = sequence_nll(reference, batch["forget"]).detach() - sequence_nll(model, batch["forget"])
    expected = -2 / 0.3 * F.logsigmoid(-0.3 * ratio).mean() * 2.0
    retain = batch["retain"]
    if retain_loss_type == "NLL":  # in fp64, where the model's own loss is fp32
        retain_loss = sequence_nll(model, retain).sum() / (retain["labels"][:, 1:] != -100).sum()
    else:
        retain_loss = model(**retain).loss
    expected = expected + 0.7 * retain_loss
    found = trainer.compute_loss(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # references are kept in fp32
    for one, other in zip(
        torch.autograd.grad(found, [*model.parameters()]),
        torch.autograd.grad(expected, [*model.parameters()]),
        strict=True,
    ):
        assert_near(one, other, 1e-6)  # Llama's norms are fp32
    if retain_loss_type == "NLL":
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
