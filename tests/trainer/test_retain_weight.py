"""``--keep-utility``: the retain coefficient that a constraint on the retain data asks for."""

import dataclasses
import math
import re

import pytest
import torch

from npo_fast.cli import main
from npo_fast.data import TokenizedExample
from npo_fast.errors import UserError
from npo_fast.methods import Coefficients, build_method
from npo_fast.trainer.loop import check_settings, reference_cache_for, reference_log_probs, train
from npo_fast.trainer.retain_weight import RetainWeight
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.state import TrainState
from tests.helpers import (
    FACTS,
    dropout_lm,
    exit_code,
    metadata_of,
    read_jsonl,
    save_tiny_model,
    slow_but,
    small_lm,
    sources,
    write_jsonl,
)

SETTINGS = TrainSettings(epochs=6, batch_size=4, lr=3e-3, keep_utility=0.9)


def steps(lm, settings=SETTINGS, method="NPO+RT", state=None, first=None, **coefficients):
    terms, first = build_method(method, Coefficients(**coefficients)), first or lm
    references = reference_log_probs(first, sources(), terms, 2048, also=("retain",))
    cache = reference_cache_for(terms, first, sources(), 2048)
    return train(lm, sources(), terms, settings, references, cache, state)


@pytest.mark.parametrize("method", slow_but(["NPO+KL"], ["NPO+RT", "NPO+KL", "DPO+RT", "IDK+RT"]))
def test_the_coefficient_is_that_of_a_controller_worked_out_from_the_records(method):
    """From the log-probs of the records alone, a step after the other."""
    lm, name = small_lm(), "kl" if method.endswith("KL") else "retain"
    references = reference_log_probs(lm, sources(), (), 2048, also=("retain",))["retain"].double()
    seen, data = [], sources()["retain"]

    class Watched(list):
        def __getitem__(self, i):
            if isinstance(i, int):
                seen.append(i)
            return super().__getitem__(i)

    settings = dataclasses.replace(SETTINGS, epochs=8, batch_size=7, lr=1e-2, warmup_steps=0)
    terms = build_method(method, Coefficients(**{name: 3.0}))
    watched = {**sources(), "retain": Watched(data)}
    found = reference_log_probs(lm, sources(), terms, 2048, also=("retain",))
    cache = reference_cache_for(terms, lm, sources(), 2048)
    smooth, total, expected = 0.0, 0.0, 3.0
    for record in train(lm, watched, terms, settings, found, cache):
        batch, seen[:] = seen[-7:], []
        assert record.retain_coefficient == pytest.approx(expected, rel=1e-6)
        forget, retain = list(record.terms.values())
        assert record.loss == pytest.approx(forget + expected * retain, rel=1e-4, abs=1e-4)
        tokens = sum(data[i].answer_length for i in batch)
        lost = float(sum(references[i] for i in batch)) - 7 * record.log_probs["retain"]
        smooth = (smooth + lost / tokens) / 2
        excess = max(-1.0, min(1.0, smooth / -math.log(0.9) - 1))
        total += 0.05 * excess
        expected = 3.0 * math.exp(4 * (excess + 1) + total)
        assert record.kept_utility == pytest.approx(math.exp(-smooth), rel=1e-5)
    assert expected != 3.0, "the coefficient moved"


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("force", [0.1, 1.0, 100.0])
def test_a_problem_of_one_weight_ends_where_the_constraint_binds(share, force):
    """Forgetting pulls w with a constant force, and w ** 2 is what a retain token loses."""
    (_, retain) = build_method("GA+RT")
    weight = RetainWeight(share, [retain], {"retain": torch.zeros(1)})
    batch, w = {"retain": [TokenizedExample((1, 2), 1, 0)]}, 0.0
    for t in range(4000):
        gradient = weight.coefficient * 2 * w - force
        w -= 0.01 * (1 - t / 4000) * max(-1.0, min(1.0, gradient))  # clipped, as steps are
        weight.update(batch, {"retain": -(w**2)})
    assert weight.kept == pytest.approx(share, abs=0.02 * (1 - share) + 0.002)
    assert math.exp(-(w**2)) == pytest.approx(share, abs=0.02 * (1 - share) + 0.002)


@pytest.mark.parametrize("method", slow_but(["NPO+RT"], ["NPO+RT", "NPO+KL"]))
def test_a_resumed_run_is_the_run_to_the_bit(tmp_path, method):
    whole, one, state = dropout_lm(), dropout_lm(), TrainState()
    expected = list(steps(whole, SETTINGS, method))
    kept = []
    for record in steps(one, SETTINGS, method, state):
        kept.append(record)
        if record.step == 5:
            state.writer()(tmp_path)
            break
    other = dropout_lm()
    other.model.load_state_dict(one.model.state_dict())
    kept += steps(other, SETTINGS, method, TrainState.load(tmp_path), first=dropout_lm())
    strip = [dataclasses.replace(record, time_ms=0.0) for record in kept]
    assert strip == [dataclasses.replace(record, time_ms=0.0) for record in expected]
    for p, q in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("method", "changed", "message"),
    [
        ("NPO", {}, r"use a method with \+RT or \+KL"),
        ("GA+forgetKL", {}, r"use a method with \+RT or \+KL"),
        ("NPO+RT", {"schedule": "alternating"}, "use schedule summed"),
        ("NPO+RT", {"retain": 0.0}, "cannot start from 0"),
    ],
)
def test_what_cannot_be_weighed_is_refused(method, changed, message):
    coefficients = {name: changed.pop(name) for name in list(changed) if name == "retain"}
    terms = build_method(method, Coefficients(**coefficients))
    with pytest.raises(UserError, match=message):
        check_settings(small_lm(), sources(), terms, dataclasses.replace(SETTINGS, **changed))


@pytest.mark.parametrize("bad", ["0", "1", "1.5", "-0.1", "nan", "inf", "most"])
def test_a_share_that_is_none_is_refused(tmp_path, capsys, bad):
    arguments = ["unlearn", "--model", "m", "--forget", "f", "--output", str(tmp_path / "run")]
    assert exit_code([*arguments, "--keep-utility", bad]) == 2
    assert re.search(f"keep.utility.*{bad}", capsys.readouterr().err)


def test_the_front_door_records_the_coefficient_and_goes_on_with_it(tmp_path, capsys):
    """A method without a reference of its own: the log-probs of the retain data are kept."""
    home = save_tiny_model(tmp_path / "model")
    forget, retain = (write_jsonl(tmp_path / f"{n}.jsonl", rows) for n, rows in
                      (("forget", FACTS[6:]), ("retain", FACTS[:6])))  # fmt: skip
    run = ["unlearn", "--model", str(home), "--forget", str(forget), "--retain", str(retain),
           "--method", "GA+RT", "--lr", "1e-3", "--epochs", "4", "--batch-size", "2",
           "--retain-coefficient", "2", "--keep-utility", "0.9", "--no-report"]  # fmt: skip
    assert main([*run, "--output", str(tmp_path / "run")]) == 0
    lines, final = read_jsonl(tmp_path / "run/steps.jsonl"), metadata_of(tmp_path / "run")["final"]
    assert lines[0]["retain_coefficient"] == 2.0
    assert final["retain_coefficient"] == lines[-1]["retain_coefficient"] != 2.0
    assert f"retain coefficient {final['retain_coefficient']:.3g}; " in capsys.readouterr().err
