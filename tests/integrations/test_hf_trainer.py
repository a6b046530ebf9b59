"""Unlearning under transformers.Trainer: the losses of our own loop, in another's loop."""

import os
from datetime import timedelta

import pytest
import torch
import transformers
from transformers import TrainingArguments

from npo_fast.errors import UserError
from npo_fast.integrations.hf_trainer import (
    UnlearningCollator,
    UnlearningDataset,
    UnlearningTrainer,
)
from npo_fast.methods import METHODS, Coefficients, build_method
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs, train
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import sequences, slow_but, small_lm


def arguments(folder, **changes) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 6,
        "learning_rate": 3e-3,
        "num_train_epochs": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
    }
    return TrainingArguments(**{**defaults, **changes})


def trainer(folder, method="NPO+RT", model=None, retain=6, coefficients=None, **changes):
    return UnlearningTrainer(
        model or small_lm().model,
        arguments(folder, **changes),
        UnlearningDataset(
            sequences(6, 1), sequences(retain, 2), idk=sequences(6, 3), alternate=sequences(6, 4)
        ),
        method=method,
        coefficients=coefficients,
    )


def logged(one: UnlearningTrainer) -> list[dict[str, float]]:
    return [entry for entry in one.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_npo_through_the_trainer_lowers_the_forget_log_probs(tmp_path):
    one = trainer(tmp_path)
    one.train()
    logs = logged(one)
    assert logs[-1]["forget log-prob"] < logs[0]["forget log-prob"] - 1
    assert logs[-1]["NPO"] < logs[0]["NPO"]
    with one.lm.packing():
        after = reference_log_probs(one.lm, one.train_dataset.sources, one.terms, 2048)
    assert after["forget"].mean() < one.references["forget"].mean()


@pytest.mark.parametrize("method", slow_but(["NPO+RT"], METHODS))
def test_the_first_step_is_that_of_our_own_loop(tmp_path, method):
    coefficients = Coefficients(retain=3.0).for_method(method)
    one = trainer(tmp_path, method, coefficients=coefficients, max_steps=1)
    one.train()
    lm, terms, sources = small_lm(), build_method(method, coefficients), one.train_dataset.sources
    settings = TrainSettings(epochs=1, batch_size=6)
    references = reference_log_probs(lm, sources, terms, 2048)
    cache = reference_cache_for(terms, lm, sources, 2048)
    own = next(train(lm, sources, terms, settings, references, cache))
    (log,) = logged(one)
    assert log["loss"] == pytest.approx(own.loss, rel=1e-5, abs=1e-4)
    assert log["grad_norm"] == pytest.approx(own.grad_norm, rel=1e-4)
    for name, value in own.terms.items():
        assert log[name] == pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_gradient_accumulation_is_the_whole_batch_for_a_mean_over_sequences(tmp_path):
    whole, parts = (
        trainer(
            tmp_path, "NPO", max_steps=2, per_device_train_batch_size=6 // n,
            gradient_accumulation_steps=n, max_grad_norm=0.0, optim="sgd",
        )
        for n in (1, 3)
    )  # fmt: skip
    whole.train()
    parts.train()
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    for a, b in zip(logged(whole), logged(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_a_checkpoint_is_a_plain_model_and_training_resumes_from_it(tmp_path):
    one = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    one.train()
    folder = tmp_path / "checkpoint-2"
    assert "npo_fast" not in (folder / "config.json").read_text()
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(saved(ids).logits, one.model.eval()(ids).logits)

    resumed = trainer(tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(resumed.references["forget"], one.references["forget"])
    for p, q in zip(one.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.slow
def test_outside_training_the_model_has_its_own_attention(tmp_path):
    model = small_lm().model
    native = "sdpa"
    one = trainer(tmp_path, model=model, max_steps=1)
    assert model.config._attn_implementation == native
    one.train()
    assert model.config._attn_implementation == native


@pytest.mark.slow
def test_bf16_autocast_starts_at_the_reference(tmp_path):
    one = trainer(tmp_path, "NPO", bf16=True, max_steps=1)
    one.train()
    assert logged(one)[0]["forget log-prob"] == pytest.approx(
        float(one.references["forget"].mean()), rel=1e-3
    )


def test_every_retain_sequence_is_seen_before_any_is_seen_again():
    data = UnlearningDataset(sequences(4, 1), sequences(10, 2), seed=3)
    seen = []
    for epoch in range(5):
        data.set_epoch(epoch)
        items = [data[i] for i in range(len(data))]
        assert [item["forget"].index for item in items] == [0, 1, 2, 3]
        seen += [item["retain"].index for item in items]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_a_retain_set_smaller_than_the_forget_set_repeats():
    data = UnlearningDataset(sequences(7, 1), sequences(3, 2))
    seen = [data[i]["retain"].index for i in range(7)]
    assert sorted(seen[:3]) == sorted(seen[3:6]) == [0, 1, 2]


@pytest.mark.slow
def test_the_trainer_draws_new_partners_every_epoch(tmp_path):
    one = trainer(tmp_path, retain=20, num_train_epochs=3)
    data = one.train_dataset
    first = {data[i]["retain"].index for i in range(len(data))}
    one.train()
    assert not first & {data[i]["retain"].index for i in range(len(data))}


def test_the_collator_packs_every_source_whole():
    data = UnlearningDataset(sequences(5, 1), sequences(5, 2))
    batch = UnlearningCollator()([data[i] for i in range(5)])
    assert set(batch) == {"forget", "retain"}
    assert sorted(batch["forget"].indices) == list(range(5))
    assert len(batch["retain"].labels) == sum(s.answer_length for s in data.sources["retain"])


def test_a_wrapped_model_is_refused(tmp_path):
    one = trainer(tmp_path)
    batch = UnlearningCollator()([one.train_dataset[0]])
    with pytest.raises(UserError, match="weight whole, and the model is wrapped as DataParallel"):
        one.compute_loss(torch.nn.DataParallel(one.model), batch)


def test_what_cannot_work_is_refused_early(tmp_path):
    with pytest.raises(UserError, match="needs retain data"):
        trainer(tmp_path, "NPO+RT", retain=0)
    with pytest.raises(UserError, match="forget is empty"):
        UnlearningDataset([], sequences(3, 2))
    data = UnlearningDataset(sequences(2, 1))
    with pytest.raises(UserError, match="no eval_dataset"):
        UnlearningTrainer(
            small_lm().model, arguments(tmp_path), data, method="NPO", eval_dataset=data
        )


def _process(rank: int, folder: str) -> None:
    """One of two: three sequences each, of unequal length."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "nowhere", "MASTER_PORT": "0"}  # accelerate wants to see them
    torch.set_num_threads(1)
    # they meet in a file: a port that was free a moment ago can be taken, and both then wait
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", timedelta(minutes=2), world_size=2, rank=rank
    )
    one = trainer(folder, per_device_train_batch_size=3, ddp_backend="gloo", **SHORT)
    one.train()
    parameters = [p.detach() for p in one.model.parameters()]
    torch.save((logged(one), parameters), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # taking DDP and gloo down can hang (seen once), and both have said all they have


SHORT = {"max_steps": 2, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 1.0}


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_whole_batch(tmp_path):
    """NPO is a mean over sequences, the retain loss one over tokens, of which each has its own."""
    whole = trainer(tmp_path, **SHORT)
    whole.train()
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        logs, parameters = torch.load(tmp_path / f"{rank}.pt")
        for p, q in zip(parameters, whole.model.parameters(), strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)
        for log, expected in zip(logs, logged(whole), strict=True):
            for name in {"loss", "grad_norm", *(t.name for t in whole.terms), "forget log-prob"}:
                assert log[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


@pytest.mark.slow
def test_trainers_share_the_log_probs_of_the_reference(tmp_path, monkeypatch):
    def losses(cache):
        one = UnlearningTrainer(
            small_lm().model, arguments(tmp_path, max_steps=2),
            UnlearningDataset(sequences(6, 1), sequences(6, 2)), reference_cache=cache,
        )  # fmt: skip
        one.train()
        return [log["loss"] for log in logged(one)]

    alone = losses(None)
    assert losses(tmp_path / "cache") == alone
    monkeypatch.setattr(
        "npo_fast.model.reference_log_probs._compute", lambda *_: pytest.fail("computed again")
    )
    assert losses(tmp_path / "cache") == alone
