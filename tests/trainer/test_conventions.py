"""Schedule, weight decay and batches as transformers.Trainer and the NPO paper's code have them."""

import dataclasses

import pytest
import torch
import transformers
from torch.nn import Parameter

from npo_fast.errors import UserError
from npo_fast.methods import FINETUNE
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import train
from npo_fast.trainer.optimizers import build_optimizer, build_scheduler, decays
from npo_fast.trainer.order import step_batches, step_count
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.state import TrainState
from tests.helpers import assert_near, calm_model, sequences, slow_but, small_lm, tiny_model

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class InOurOrder(transformers.Trainer):
    """The Trainer itself, with examples in the order of its dataset."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def padded(examples: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(e["input_ids"]) for e in examples)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([e[name] + [value] * (longest - len(e[name])) for e in examples])
        for name, value in fill.items()
    }


def huggingface_run(model, batches, folder, **arguments):
    """Weights after one step a batch of transformers.Trainer, and its rates."""
    rows = [
        {
            "input_ids": list(s.input_ids),
            "labels": [-100] * s.prompt_length + list(s.input_ids[s.prompt_length :]),
            "attention_mask": [1] * len(s.input_ids),
        }
        for batch in batches
        for s in batch
    ]
    settings = transformers.TrainingArguments(
        folder, per_device_train_batch_size=len(batches[0]), num_train_epochs=1, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, **arguments,
    )  # fmt: skip
    trainer = InOurOrder(model, settings, padded, train_dataset=rows)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    return [p.detach() for p in model.parameters()], rates


@pytest.mark.parametrize("family", slow_but(["Qwen2"], ["GPT2", "Qwen2"]))
@pytest.mark.parametrize("schedule", slow_but(["linear"], SCHEDULES))
def test_ten_steps_are_those_of_transformers_trainer(family, schedule, tmp_path):
    """In fp64, where Adam does not turn the rounding of a zero gradient into a step."""
    warmup = {"linear": 3, "cosine": 2, "constant": 0}[schedule]
    settings = TrainSettings(
        epochs=2, batch_size=2, lr=1e-2, warmup_steps=warmup, lr_schedule=schedule, weight_decay=0.3
    )
    data = {"train": sequences(10, 1)}
    batches = [batch["train"] for batch in step_batches(data, ("train",), settings)]
    torch.manual_seed(0)
    start = calm_model(family, **dict.fromkeys(DROPOUTS.get(family, ()), 0.0)).double()
    models = [start, type(start)(start.config).double()]
    models[1].load_state_dict(start.state_dict())
    expected, their_rates = huggingface_run(
        models[0], batches, tmp_path, learning_rate=1e-2, weight_decay=0.3,
        warmup_steps=warmup, lr_scheduler_type=SCHEDULES[schedule],
    )  # fmt: skip
    records = list(train(CausalLM(models[1], probe=False), data, FINETUNE, settings))
    assert len(records) == len(batches) == 10
    assert [r.lr for r in records] == pytest.approx(their_rates, rel=1e-6, abs=1e-12)
    assert (records[0].lr == 0) == (warmup > 0)
    for ours, theirs in zip(models[1].parameters(), expected, strict=True):
        assert_near(ours.detach(), theirs, 1e-5)  # the loss of transformers is computed in fp32


DROPOUTS = {"GPT2": ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
FAMILIES = ["GPT2", "Qwen2", "Llama", "Phi", "GPTNeoX", "Cohere", "Bloom", "Gemma2", "FalconH1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_decay_spares_what_transformers_trainer_spares(family):
    model = tiny_model(family)
    theirs = set(transformers.Trainer.get_decay_parameter_names(None, model))
    names = {id(p): name for name, p in model.named_parameters()}
    ours = {names[id(p)] for p, decay in decays(model) if decay}
    assert ours == theirs & set(names.values())
    assert ours < set(names.values())


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "adamw-bf16"])
def test_every_optimizer_has_the_rates_and_spares_norms(name):
    dtype = torch.bfloat16 if name == "adamw-bf16" else torch.float32
    model = torch.nn.ModuleDict({"norm": torch.nn.Linear(2, 2), "up": torch.nn.Linear(64, 64)})
    optimizer = build_optimizer(model.to(dtype), name, lr=0.5, weight_decay=0.25)
    decay, spared = optimizer.param_groups
    assert decay["params"] == [model["up"].weight]
    assert spared["params"] == [model["norm"].weight, model["norm"].bias, model["up"].bias]
    assert (decay["weight_decay"], spared["weight_decay"]) == (0.25, 0.0)
    scheduler = build_scheduler(optimizer, "linear", 2, 4)
    rates = []
    for _ in range(5):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates == [[rate] * 2 for rate in (0.0, 0.25, 0.5, 0.25, 0.0)]


@pytest.mark.parametrize(
    ("last_batch", "sizes"),
    [("keep", [3, 3, 1] * 3), ("drop", [3, 3] * 3), ("carry", [3] * 7)],
)
def test_the_rest_of_an_epoch_is_kept_dropped_or_carried(last_batch, sizes):
    settings = TrainSettings(epochs=3, batch_size=3, last_batch=last_batch)
    data = {"forget": sequences(7, 1), "retain": sequences(5, 2)}
    batches = list(step_batches(data, ("forget",), settings))
    assert [len(batch["forget"]) for batch in batches] == sizes
    assert [len(batch["retain"]) for batch in batches] == sizes
    assert step_count(7, settings) == len(sizes)
    seen = [s.index for batch in batches for s in batch["forget"]]
    if last_batch == "carry":
        assert sorted(seen[:7]) == sorted(seen[7:14]) == sorted(seen[14:]) == list(range(7))
    whole = list(step_batches(data, ("forget",), dataclasses.replace(settings, last_batch="keep")))
    assert [s.index for s in batches[0]["forget"]] == [s.index for s in whole[0]["forget"]]


def test_the_papers_steps_on_forget01_are_twelve_with_one_of_warm_up():
    """int(10 * 40) // 32 steps, 40 // 32 of them warm-up: TOFU/forget.py of its code."""
    settings = TrainSettings(last_batch="carry", lr=1.0)
    data = {"train": sequences(40, 1)}
    torch.manual_seed(0)
    lm = CausalLM(calm_model(), probe=False)
    records = list(train(lm, data, FINETUNE, dataclasses.replace(settings, lr=1e-5)))
    assert len(records) == records[0].steps == 12
    assert [r.lr for r in records[:2]] == [0.0, pytest.approx(1e-5)]
    assert records[-1].epoch == pytest.approx(12 * 32 / 40)


def test_a_batch_that_no_epoch_fills_is_refused():
    for last_batch in ("drop", "carry"):
        settings = TrainSettings(epochs=2, batch_size=8, last_batch=last_batch)
        with pytest.raises(UserError, match=f"{last_batch} leaves no batch of 8 among 3 sequences"):
            step_count(3, settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_schedule": "cosine", "last_batch": "carry"},
        pytest.param({"step_in_backward": True, "last_batch": "drop"}, marks=pytest.mark.slow),
        pytest.param(
            {"optimizer": "adamw-8bit", "lr_schedule": "constant"}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_resumed_run_has_the_same_rates_batches_and_weights(changes, tmp_path):
    settings = TrainSettings(epochs=3, batch_size=3, lr=1e-2, warmup_steps=3, **changes)
    data = {"train": sequences(7, 1)}
    whole = small_lm()
    expected = list(train(whole, data, FINETUNE, settings))
    one, state = small_lm(), TrainState()
    steps = train(one, data, FINETUNE, settings, state=state)
    for _ in range(4):
        next(steps)
    state.writer()(tmp_path)
    other = small_lm()
    other.model.load_state_dict(one.model.state_dict())
    rest = list(train(other, data, FINETUNE, settings, state=TrainState.load(tmp_path)))
    assert [(r.lr, r.loss, r.epoch) for r in rest] == [
        (r.lr, r.loss, r.epoch) for r in expected[4:]
    ]
    for p, q in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_frozen_weights_are_in_no_group():
    model = torch.nn.ModuleDict({"norm": torch.nn.Linear(2, 2), "up": torch.nn.Linear(2, 2)})
    model["norm"].requires_grad_(False)
    model["up"].bias.requires_grad_(False)
    optimizer = build_optimizer(model, "adamw", lr=1.0, weight_decay=0.1)
    assert [group["params"] for group in optimizer.param_groups] == [[model["up"].weight]]
    assert isinstance(model["up"].weight, Parameter)
