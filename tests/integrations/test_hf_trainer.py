"""Unlearning under transformers.Trainer: the losses of our own loop, in another's loop."""

import os
from datetime import timedelta

import pytest
import torch
import transformers

from npo_fast.errors import UserError
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.integrations.hf_trainer import (
    UnlearningCollator,
    UnlearningDataset,
    UnlearningTrainer,
)
from npo_fast.methods import METHODS, Coefficients, build_method
from npo_fast.metrics import FORGET, RETAIN, save_result
from npo_fast.metrics.measures import RECORDED, measures, score
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs, train
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import (
    calm_model,
    evaluation_of,
    logged,
    sequences,
    slow_but,
    small_lm,
    trainer_arguments,
    uneven,
)


def trainer(folder, method="NPO+RT", model=None, retain=6, coefficients=None, **changes):
    return UnlearningTrainer(
        model or small_lm().model,
        trainer_arguments(folder, **changes),
        UnlearningDataset(
            sequences(6, 1), sequences(retain, 2), idk=sequences(6, 3), alternate=sequences(6, 4)
        ),
        method=method,
        coefficients=coefficients,
    )


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
    settings = TrainSettings(epochs=1, batch_size=6, seed=one.args.seed)
    references = reference_log_probs(lm, sources, terms, 2048)
    cache = reference_cache_for(terms, lm, sources, 2048)
    own = next(train(lm, sources, terms, settings, references, cache))
    (log,) = logged(one)
    assert log["loss"] == pytest.approx(own.loss, rel=1e-5, abs=1e-4)
    assert log["grad_norm"] == pytest.approx(own.grad_norm, rel=1e-4)
    for name, value in own.terms.items():
        assert log[name] == pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", slow_but(["GA+RT"], METHODS))
def test_device_batches_of_one_are_one_batch_of_all(tmp_path, method):
    """In fp64, since some methods hardly move the weights of an untaught model."""
    data = UnlearningDataset(uneven(7, 1), uneven(9, 2), idk=uneven(7, 3), alternate=uneven(7, 4))
    found = []
    for batch, parts in ((4, 1), (1, 4)):  # and three in the last step of the epoch
        torch.manual_seed(0)
        one = UnlearningTrainer(
            calm_model().double(),
            trainer_arguments(
                tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=parts,
                num_train_epochs=2, max_grad_norm=0.0, optim="sgd", learning_rate=1e-2,
            ),
            data, method=method,
        )  # fmt: skip
        one.train()
        found.append((list(one.model.parameters()), logged(one)))
    (weights, logs), (other_weights, other_logs) = found
    assert len(logs) == len(other_logs) == 4
    for p, q in zip(weights, other_weights, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-8)
    for log, other in zip(logs, other_logs, strict=True):
        for name in {"loss", "forget log-prob", *(term.name for term in one.terms)} & set(log):
            assert log[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name


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


def test_the_trainer_evaluates_by_our_measures_and_keeps_the_best(tmp_path):
    measured = evaluation_of(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    logs = evaluate(CausalLM(model), measured.template, measured.suite, measured.settings)
    save_result(logs, tmp_path / "log")
    with_quality = evaluation_of(tmp_path, retrained=tmp_path / "log")
    examples = {
        name: with_quality.template.encode_all(records.records)[0]
        for name, records in with_quality.suite.items()
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    one = UnlearningTrainer(
        model,
        trainer_arguments(
            tmp_path, num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch",
            load_best_model_at_end=True, metric_for_best_model="forget.probability",
            greater_is_better=False,
        ),
        UnlearningDataset(examples[FORGET], examples[RETAIN]),
        eval_dataset=with_quality,
    )  # fmt: skip
    before = one.evaluate()
    assert before["eval_forget_quality"] == pytest.approx(1.0), "it is the retrained model"
    expected = measures(logs, logs)
    for key in RECORDED:
        if (value := score(expected, key)) is not None:
            assert before[f"eval_{key}"] == pytest.approx(value, rel=1e-5), key
    one.train()
    looks = [entry for entry in one.state.log_history if "eval_forget.probability" in entry]
    assert len(looks) == 2
    best = min(looks, key=lambda look: look["eval_forget.probability"])
    assert best["eval_forget.probability"] < before["eval_forget.probability"]
    assert one.state.best_metric == best["eval_forget.probability"]
    after = one.evaluate()
    assert after == pytest.approx({name: best[name] for name in after}, rel=1e-5)


@pytest.mark.slow
def test_looking_does_not_change_the_training(tmp_path):
    measured = evaluation_of(tmp_path)
    records = [record for rows in measured.suite.values() for record in rows.records]
    examples, _ = measured.template.encode_all(records)
    found = []
    for strategy in ("no", "steps"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        one = UnlearningTrainer(
            model,
            trainer_arguments(tmp_path, max_steps=3, eval_strategy=strategy, eval_steps=1),
            UnlearningDataset(examples[:4], examples[4:]), eval_dataset=measured,
        )  # fmt: skip
        one.train()
        found.append([log["loss"] for log in logged(one)])
    assert found[0] == found[1]


@pytest.mark.slow
def test_compiled_layers_take_the_same_steps(tmp_path):
    plain, compiled = (
        trainer(tmp_path, "KTO+RT", max_steps=2, per_device_train_batch_size=3,
                gradient_accumulation_steps=2, **compile_)
        for compile_ in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"})
    )  # fmt: skip
    plain.train()
    compiled.train()
    assert all(layer._compiled_call_impl for layer in compiled.lm.decoder.layers)
    for log, expected in zip(logged(compiled), logged(plain), strict=True):
        assert log["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert log["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_wrapped_model_is_refused(tmp_path):
    one = trainer(tmp_path)
    batch = UnlearningCollator()([one.train_dataset[0]])
    with pytest.raises(UserError, match="cannot train a model wrapped as DataParallel"):
        one.compute_loss(torch.nn.DataParallel(one.model), batch)
    several = trainer_arguments(tmp_path)
    assert several.n_gpu == 0
    several._n_gpu = 2
    with pytest.raises(UserError, match="wrapped as DataParallel: start one process a GPU"):
        UnlearningTrainer(small_lm().model, several, one.train_dataset)


def test_what_cannot_work_is_refused_early(tmp_path):
    with pytest.raises(UserError, match="needs retain data"):
        trainer(tmp_path, "NPO+RT", retain=0)
    with pytest.raises(UserError, match="forget is empty"):
        UnlearningDataset([], sequences(3, 2))
    data = UnlearningDataset(sequences(2, 1))
    with pytest.raises(UserError, match="must be an UnlearningEvaluation.*UnlearningDataset"):
        UnlearningTrainer(
            small_lm().model, trainer_arguments(tmp_path), data, method="NPO", eval_dataset=data
        )
    with pytest.raises(UserError, match="evaluate needs an UnlearningEvaluation"):
        trainer(tmp_path).evaluate()


def _process(rank: int, folder: str, method: str, parts: int) -> None:
    """One of two: three sequences each, of unequal length, in so many device batches."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "nowhere", "MASTER_PORT": "0"}  # accelerate wants to see them
    torch.set_num_threads(1)
    # they meet in a file: a port that was free a moment ago can be taken, and both then wait
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", timedelta(minutes=2), world_size=2, rank=rank
    )
    one = trainer(
        folder, method, per_device_train_batch_size=3 // parts, gradient_accumulation_steps=parts,
        ddp_backend="gloo", **SHORT,
    )  # fmt: skip
    one.train()
    parameters = [p.detach() for p in one.model.parameters()]
    torch.save((logged(one), parameters), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # taking DDP and gloo down can hang (seen once), and both have said all they have


SHORT = {"max_steps": 2, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "parts"), [("NPO+RT", 1), ("KTO+RT", 3)])
def test_two_processes_train_as_one_on_the_whole_batch(tmp_path, method, parts):
    """NPO and KTO are means over sequences, the retain loss over tokens: each has its own."""
    whole = trainer(tmp_path, method, **SHORT)
    whole.train()
    torch.multiprocessing.spawn(_process, (str(tmp_path), method, parts), nprocs=2)
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
            small_lm().model, trainer_arguments(tmp_path, max_steps=2),
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
