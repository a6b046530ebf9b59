"""The examples run, and their losses are those of plain PyTorch, of our own loop and of TRL."""

import copy
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from npo_fast.data import PaddedCollator, Template, load_records
from npo_fast.methods import build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import reference_log_probs, train
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import FACTS, assert_near, save_tiny_model, write_jsonl

EXAMPLES = Path(__file__).parents[2] / "examples"
FORGET, RETAIN = load_records(FACTS[:4]), load_records(FACTS[4:8])


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


def test_no_example_is_longer_than_sixty_lines():
    long = {
        f.name: n for f in EXAMPLES.glob("*.py") if (n := len(f.read_text().splitlines())) >= 60
    }
    assert not long


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
    first_line = (EXAMPLES / f"{name}.py").read_text().partition("\n")[0]
    assert first_line.endswith(f"python examples/{name}.py MODEL {usage}")
    command = [sys.executable, EXAMPLES / f"{name}.py", home / "model", *(home / f for f in files)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


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
