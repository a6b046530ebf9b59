"""Rounding keeps its bound, attacks work on copies, and are measured on what they did not see."""

import json

import pytest
import torch

from npo_fast import metrics
from npo_fast.attacks.options import AttackOptions
from npo_fast.attacks.quantize import fake_quantize, quantize_, quantized
from npo_fast.attacks.relearn import Split, relearned
from npo_fast.cli import main
from npo_fast.data import Record, Template
from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.load import load_model, load_tokenizer
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import FACTS, save_tiny_model, tiny_model, write_jsonl


def test_weights_are_rounded_to_the_nearest_step_of_their_group():
    weight = torch.tensor([[7.0, -3.4, 0.6, 0.0], [0.0, 0.0, 0.0, 1.0]])
    whole = torch.tensor([[7.0, -3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    torch.testing.assert_close(fake_quantize(weight, 4, 4), whole)
    in_pairs = torch.tensor([[7.0, -3.0, 0.6, 0.0], [0.0, 0.0, 0.0, 1.0]])
    torch.testing.assert_close(fake_quantize(weight, 4, 2), in_pairs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 128, 300])
def test_the_rounding_error_is_at_most_half_a_step(bits, columns):
    weight = torch.randn(5, columns, dtype=torch.float64)
    found = fake_quantize(weight, bits, 128)
    for first in range(0, columns, 128):
        part, got = weight[:, first : first + 128], found[:, first : first + 128]
        step = part.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((got - part).abs() <= step / 2 * (1 + 1e-12)).all()
        levels = got / step
        torch.testing.assert_close(levels, levels.round())
        assert levels.abs().max() <= 2 ** (bits - 1) - 1 + 1e-9


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_only_the_linear_layers_of_the_decoder_are_rounded(family):
    lm = CausalLM(tiny_model(family), probe=False)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    share = quantize_(lm, 4, 16)
    changed = {n for n, p in lm.model.named_parameters() if not torch.equal(p, before[n])}
    outside = ("embed_tokens", "wte", "head")
    whole = sum(p.numel() for n, p in before.items() if not any(name in n for name in outside))
    assert sum(before[name].numel() for name in changed) / whole == pytest.approx(share)
    assert share > 0.5
    assert all(before[name].dim() == 2 for name in changed)
    assert not [n for n in changed if any(kept in n for kept in ("embed", "wte", "wpe", "head"))]
    for name in changed:
        old, new = before[name], dict(lm.model.named_parameters())[name]
        old, new = (old.t(), new.t()) if family == "GPT2" else (old, new)
        torch.testing.assert_close(new, fake_quantize(old, 4, 16))


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4Text"])
def test_the_experts_of_a_mixture_are_rounded_each_by_its_own_inputs(family):
    lm = CausalLM(tiny_model(family, num_local_experts=3), probe=False)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    assert quantize_(lm, 3, 16) > 0.5
    experts = {n: p for n, p in lm.model.named_parameters() if "experts" in n and p.dim() == 3}
    assert len(experts) == 4
    inputs_first = family != "Mixtral"
    for name, found in experts.items():
        for own, old in zip(found, before[name], strict=True):
            expected = (
                fake_quantize(old.t(), 3, 16).t() if inputs_first else fake_quantize(old, 3, 16)
            )
            torch.testing.assert_close(own, expected)
    routers = [name for name in before if "router" in name or ".gate." in name]
    assert routers
    assert all(torch.equal(dict(lm.model.named_parameters())[n], before[n]) for n in routers)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "base")
    write_jsonl(folder / "forget.jsonl", [
        {**f, "perturbed_answer": ["Kim.", "Lee lives."]} for f in FACTS
    ])  # fmt: skip
    return folder


def test_relearning_is_taken_back(home):
    lm = load_model(str(home / "base"))
    lm.model.eval()
    template = Template(load_tokenizer(str(home / "base")), "plain")
    before = {name: p.clone() for name, p in lm.model.state_dict().items()}
    part, _ = template.encode_all(Record((("user", f["question"]),), f["answer"]) for f in FACTS)
    training = TrainSettings(epochs=2, lr=1e-2, warmup_steps=0, gradient_checkpointing=True)
    with relearned(lm, part, training):
        assert not torch.equal(before["lm_head.weight"], lm.head.weight)
    with pytest.raises(KeyError), relearned(lm, part, training):
        raise KeyError
    assert all(torch.equal(before[n], p) for n, p in lm.model.state_dict().items())
    assert all(p.grad is None for p in lm.model.parameters())
    assert not lm.model.training
    assert not lm.recomputes_activations


def test_rounding_is_taken_back():
    lm = CausalLM(tiny_model("Llama"), probe=False)
    before = {name: p.clone() for name, p in lm.model.state_dict().items()}
    with quantized(lm, 4, 16) as share:
        assert share > 0.5
        assert not all(torch.equal(before[n], p) for n, p in lm.model.state_dict().items())
    assert all(torch.equal(before[n], p) for n, p in lm.model.state_dict().items())


RECORDS = [Record((("user", f["question"]),), f["answer"]) for f in FACTS]


def test_what_is_relearned_is_not_measured():
    split = Split.of(RECORDS, 0.2, seed=0)
    assert len(split.seen) == 2
    assert sorted(split.seen + split.rest) == list(range(10))
    assert split == Split.of(RECORDS, 0.2, seed=0) != Split.of(RECORDS, 0.2, seed=1)
    two = RECORDS[:2]
    assert len(Split.of(two, 0.01, 0).seen) == len(Split.of(two, 0.99, 0).rest) == 1
    with pytest.raises(UserError, match="at least 2 .*several files or lines"):
        Split.of(RECORDS[:1], 0.2, 0)
    assert Split.of(RECORDS[:3], 0.0, 0) == Split([], [0, 1, 2])


def test_answers_of_one_conversation_are_relearned_or_measured_together():
    asked = [("user", "Who?"), ("assistant", "Ada."), ("user", "Sure?")]
    talks = [record for i in range(6)
             for record in (Record([("user", f"{i}"), *asked[:1]], "Ada."),
                            Record([("user", f"{i}"), *asked], "Yes."))]  # fmt: skip
    for seed in range(5):
        split = Split.of(talks, 0.5, seed)
        assert len(split.seen) == 6
        assert {i // 2 for i in split.seen}.isdisjoint(i // 2 for i in split.rest)


@pytest.mark.slow
def test_the_verb_leaves_logs_and_a_summary(home, tmp_path, capsys):
    call = ["attack", "--model", str(home / "base"), "--forget", str(home / "forget.jsonl"),
            "--output", str(tmp_path / "out"), "--epochs", "20", "--lr", "1e-2",
            "--max-new-tokens", "4"]  # fmt: skip
    assert main(["evaluate", "--model", str(home / "base"), "--forget", str(home / "forget.jsonl"),
                 "--output", str(tmp_path / "log"), "--max-new-tokens", "4"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main([*call, "--retrained", str(tmp_path / "log"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["measures"]) == ["before", "relearn", "int8", "int4"]
    assert found["measures"]["before"]["forget quality"] == 1.0, "the same model, the same rows"
    measured = found["measures"]
    assert measured["relearn"]["forget probability"] > measured["before"]["forget probability"]
    assert measured["int8"] != measured["int4"] != measured["before"]
    for name in measured:
        log = metrics.load_result(tmp_path / "out" / name)[metrics.FORGET]
        assert len(log["avg_gt_loss"]) == 8
    assert json.loads((tmp_path / "out/attack.json").read_text())["measures"] == measured
    assert main(call) == 2
    assert "add --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": "relearn,quantise"}, "unknown attack 'quantise'"),
        ({"bits": "8,16"}, "from 2 to 8, got '8,16'"),
        ({"bits": "four"}, "from 2 to 8, got 'four'"),
        ({"relearn_share": 1.0}, "between 0 and 1"),
        ({"group": 0}, "group must be at least 1"),
    ],
)
def test_invalid_attack_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        AttackOptions(**options)


def test_a_file_as_output_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "out").write_text("precious")
    call = ["attack", "--model", "none", "--forget", "none", "--output", str(tmp_path / "out")]
    assert main(call) == 2
    assert "out is a file; name a folder" in capsys.readouterr().err
