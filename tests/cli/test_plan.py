"""Planned memory against real tensors, PyTorch's own tracker, and plain arithmetic."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.distributed._tools.mem_tracker import MemTracker

from npo_fast.cli import main
from npo_fast.data import TokenizedExample, pack
from npo_fast.errors import UserError
from npo_fast.kernels.products import STRIP_BYTES
from npo_fast.methods import METHODS, build_method
from npo_fast.model.layers import repeated_layers
from npo_fast.ops.cost import Problem
from npo_fast.ops.head import Head
from npo_fast.planner import Footprint, PlannedRun, advise, flags, footprint
from npo_fast.planner.memory import KINDS, state_bytes
from npo_fast.planner.model import empty_lm, empty_model
from npo_fast.planner.tracker import FlashAttention, Tracker
from npo_fast.trainer.order import check_step_in_backward
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.step import micro_batch_loss
from tests.helpers import exit_code, slow_but, tiny_model

SMALL = PlannedRun(dtype="fp32", micro_batch_tokens=64, sequence_length=16)


def config(family="Llama", **overrides):
    return tiny_model(family, **overrides).config


@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_states_are_those_of_the_real_model(tied):
    model = tiny_model("Llama", tie_word_embeddings=tied)
    model.tie_weights()
    weights = sum(p.nbytes for p in model.parameters())
    # so little data that the peak has every gradient and nothing of size beside it
    found = footprint(model.config, replace(SMALL, micro_batch_tokens=2, sequence_length=2))
    assert found.parameters == found.trained == sum(p.numel() for p in model.parameters())
    assert found.bytes["weights"] == weights + sum(b.nbytes for b in model.buffers())
    assert found.bytes["optimizer"] == 2 * weights
    assert found.bytes["gradients"] == weights


def test_the_peak_is_the_one_that_pytorchs_tracker_finds():
    def step(lm, tracker):
        sequences = [TokenizedExample((0,) * 16, 4, i) for i in range(4)]
        (micro,) = pack(sequences, 64)
        micro = micro.to(lm.device)
        terms = build_method("NPO")
        with FlashAttention():
            micro = micro.to(lm.device)
            loss, _, _ = micro_batch_loss(lm, micro, terms, {"NPO": 4}, {"forget": torch.zeros(4)})
        loss.backward()

    peaks = []
    for kind in (Tracker, MemTracker):
        lm = empty_lm(empty_model(config(), "fp32"), gradient_checkpointing=False)
        tracker = kind()
        if kind is MemTracker:
            tracker.track_external(lm.model)
        else:
            for tensor in (*lm.model.parameters(), *lm.model.buffers()):
                tracker.hold(tensor, "weights")
        with tracker:
            step(lm, tracker)
        if kind is Tracker:
            peaks.append(tracker.peak)
        else:
            peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("meta")]["Total"])
    assert peaks[0] == pytest.approx(peaks[1], rel=0.005)


def test_attention_keeps_no_score_matrix():
    def activations(length):
        plan = replace(SMALL, micro_batch_tokens=length, sequence_length=length)
        return footprint(config(max_position_embeddings=4096), plan).bytes["activations"]

    assert activations(2048) < 2.1 * activations(1024)


def test_the_chunk_of_logits_and_the_gradient_of_the_head_are_seen():
    wide = config(vocab_size=40_000)
    head = 40_000 * 32 * 4
    logits = 48 * 40_000 * 4  # four sequences of 16 tokens, a quarter of them prompt
    assert footprint(wide, SMALL).bytes["head"] >= head + logits


@pytest.mark.slow
def test_checkpointing_halves_activations_of_a_deep_model():
    deep = config(num_hidden_layers=12)
    plan = replace(SMALL, micro_batch_tokens=512)
    whole, short = (
        footprint(deep, replace(plan, gradient_checkpointing=on)) for on in (False, True)
    )
    assert short.bytes["activations"] < 0.2 * whole.bytes["activations"]
    assert short.peak < 0.5 * whole.peak


@pytest.mark.slow
def test_step_in_backward_never_holds_all_gradients():
    deep = config(num_hidden_layers=12)
    plan = replace(SMALL, micro_batch_tokens=8, sequence_length=4)
    whole, freed = (footprint(deep, replace(plan, step_in_backward=on)) for on in (False, True))
    gradients = whole.bytes["gradients"]
    assert gradients == 4 * whole.trained
    assert whole.peak - freed.peak > 0.8 * gradients


@pytest.mark.slow
def test_adapters_alone_have_gradients_and_states():
    found = footprint(config(), replace(SMALL, lora_rank=2))
    shapes = {  # in + out features of the linear layers of a block
        "q": 32 + 32, "k": 32 + 16, "v": 32 + 16, "o": 32 + 32,
        "gate": 32 + 48, "up": 32 + 48, "down": 48 + 32,
    }  # fmt: skip
    assert found.trained == 2 * 2 * sum(shapes.values())
    assert found.bytes["gradients"] == 4 * found.trained
    assert found.bytes["optimizer"] == 8 * found.trained


@pytest.mark.slow
def test_4bit_layers_take_4_127_bits_a_weight():
    sizes = {"hidden_size": 1024, "intermediate_size": 4096}
    plan = replace(SMALL, dtype="bf16", lora_rank=1)
    model = config(**sizes)
    whole, short = (footprint(model, replace(plan, quantize=q)) for q in ("none", "4bit"))
    assert whole.parameters == short.parameters
    linear = 2 * (1024 * (2 * 32 + 2 * 16) + 3 * 1024 * 4096)
    saved = whole.bytes["weights"] - short.bytes["weights"]
    assert 16 - 8 * saved / linear == pytest.approx(4.127, abs=0.001)


def test_sharpness_aware_steps_hold_a_copy_of_what_is_trained():
    sharp = replace(SMALL, sharpness_rho=0.01)
    plain, found = footprint(config(), SMALL), footprint(config(), sharp)
    assert found.bytes["copy"] == 4 * found.trained
    assert {**found.bytes, "copy": 0} == plain.bytes
    adapters = footprint(config(), replace(sharp, lora_rank=2))
    assert adapters.bytes["copy"] == 4 * adapters.trained
    halves = footprint(config(), sharp, ranks=2)
    assert halves.bytes["copy"] == pytest.approx(2 * found.trained, rel=0.01)
    assert footprint(config(), replace(sharp, offload_optimizer=True)).bytes["copy"] == 0
    advice = advise(sharp, 1e-6, lambda plan: footprint(config(), plan))
    assert not advice.fits
    assert not advice.planned.step_in_backward
    with pytest.raises(UserError, match="leave one out"):
        replace(sharp, step_in_backward=True)


def test_8bit_states_leave_small_tensors_whole():
    wide, narrow, odd = (torch.empty(n, dtype=torch.bfloat16) for n in (4096, 256, 4100))
    assert state_bytes(wide, "adamw-8bit") == 2 * (4096 + 4 * 16)
    assert state_bytes(narrow, "adamw-8bit") == 2 * 2 * 256
    assert state_bytes(odd, "adamw-8bit") == 2 * 2 * 4100
    assert state_bytes(wide.float(), "adamw-bf16") == 2 * 2 * 4096


@pytest.mark.parametrize("method", slow_but(["NPO+RT", "NPO+KL"], METHODS))
def test_every_method_can_be_planned(method):
    found = footprint(config(), replace(SMALL, method=method))
    uses_states = any(name in method for name in ("KL", "UNDIAL", "RMU"))
    assert (found.bytes["reference"] > 0) == uses_states, "the reference's head and hidden states"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["GPTNeoX", "Gemma2", "Mistral", "Phi", "GPT2", "Cohere"])
def test_other_architectures_can_be_planned(family):
    assert footprint(config(family), replace(SMALL, gradient_checkpointing=True)).peak > 0


def of_head(width, vocabulary, tokens, method="NPO", lora_rank=0):
    """Planned bytes of loss and head in bf16, the answer rows, and what outputs and rows take."""
    model = transformers.LlamaConfig(
        hidden_size=width, vocab_size=vocabulary, num_hidden_layers=1, num_attention_heads=8,
        intermediate_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    plan = PlannedRun(method=method, micro_batch_tokens=tokens, sequence_length=16)
    found = footprint(model, replace(plan, lora_rank=lora_rank)).bytes["head"]
    rows = tokens // 16 * 12  # a quarter of each sequence is prompt
    trained = 0 if lora_rank else vocabulary * width
    return found, rows, 2 * (trained + 2 * rows * width)


@pytest.mark.parametrize(
    ("way", "width", "tokens", "lora_rank"),
    [
        ("whole", 1024, 1024, 0),  # fewer rows than the width: in the gradient's memory
        ("whole", 1024, 2048, 0),  # more, and no larger than an fp32 gradient
        ("chunks", 2048, 16384, 0),
        ("slices", 256, 4096, 0),
        ("frozen", 1024, 8192, 4),
    ],
)
def test_the_head_holds_what_the_cost_model_says_of_a_gpu(way, width, tokens, lora_rank):
    vocabulary = 50_257
    found, rows, others = of_head(width, vocabulary, tokens, lora_rank=lora_rank)
    chosen = Problem(rows, width, vocabulary, 2, trains_head=not lora_rank).choose()
    assert chosen.name == way
    # the first of several chunks makes its product in strips
    strips = 2 * STRIP_BYTES if way == "chunks" else 0
    least = chosen.held_bytes + others
    assert least <= found <= 1.03 * least + strips


def test_kl_holds_a_chunk_of_the_references_logits_more():
    vocabulary, width = 100_000, 1024
    found, rows, others = of_head(width, vocabulary, tokens=1024, method="GA+KL")
    weight = torch.empty(vocabulary, width, dtype=torch.bfloat16, device="meta")
    ref_rows = Head(weight).chunk_rows()
    assert ref_rows < rows <= width
    held = Problem(rows, width, vocabulary, 2, makes_logits=True).choose().held_bytes
    assert found == pytest.approx(held + 2 * ref_rows * vocabulary + others, rel=0.03)


def test_a_rank_holds_its_share_and_the_layers_that_fsdp_gathers():
    wide = config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    plan = replace(SMALL, micro_batch_tokens=16)
    one, four = footprint(wide, plan), footprint(wide, plan, ranks=4)
    layer = sum(p.nbytes for p in repeated_layers(empty_model(wide, "fp32"))[0].parameters())
    assert (four.parameters, four.trained) == (one.parameters, one.trained)
    share = one.bytes["weights"] / 4
    assert share + 2 * layer <= four.bytes["weights"] <= 1.02 * share + 2 * layer
    share = one.bytes["gradients"] / 4
    assert share + layer / 2 <= four.bytes["gradients"] <= 1.02 * share + 1.25 * layer
    assert four.bytes["optimizer"] == pytest.approx(one.bytes["optimizer"] / 4, rel=0.02)
    assert layer <= four.bytes["backward"], "what is summed over ranks"


def test_gradients_of_bf16_weights_are_summed_in_fp32():
    wide = config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    plan = replace(SMALL, micro_batch_tokens=16)
    found = footprint(wide, replace(plan, dtype="bf16"), ranks=4)
    values = sum(p.numel() for p in repeated_layers(empty_model(wide, "bf16"))[0].parameters())
    assert found.bytes["backward"] >= 4 * values


def test_the_head_of_a_rank_has_answer_rows_of_all():
    wide = config(vocab_size=40_000)
    found = footprint(wide, SMALL, ranks=4).bytes["head"]
    own, rows = 10_000, 4 * 48  # a quarter of 64 tokens is prompt
    problem = Problem(rows, 32, own, 4, makes_logits=True)
    assert found >= problem.choose().held_bytes + 4 * own * 32


@pytest.mark.parametrize("method", slow_but(["NPO+KL"], ["NPO+RT", "UNDIAL", "RMU"]))
@pytest.mark.parametrize(
    "changes",
    slow_but(
        [{"step_in_backward": True}],
        [{"gradient_checkpointing": True}, {"lora_rank": 2}, {"offload_optimizer": True}],
    ),
)
def test_what_several_gpus_can_do_can_be_planned(method, changes):
    plan = replace(SMALL, method=method, **changes)
    one, two = (footprint(config(), plan, ranks=ranks) for ranks in (1, 2))
    assert (two.parameters, two.trained) == (one.parameters, one.trained)
    assert two.bytes["weights"] > 0


def test_4bit_weights_are_whole_on_each_gpu_while_they_load():
    wide = config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    plan = replace(SMALL, dtype="bf16", lora_rank=2, quantize="4bit", micro_batch_tokens=16)
    one, eight = (footprint(wide, plan, ranks=ranks) for ranks in (1, 8))
    assert one.whole_bytes == 0
    assert eight.whole_bytes == pytest.approx(one.bytes["weights"], rel=0.01)
    assert eight.bytes["weights"] < 0.75 * one.bytes["weights"], "an eighth, and two layers"
    larger = replace(eight, whole_bytes=10 * eight.needed)
    assert larger.needed > larger.whole_bytes


def test_an_embedding_that_scales_its_rows_is_divided():
    gemma = transformers.Gemma2Config(
        vocab_size=8000, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    one, four = (footprint(gemma, SMALL, ranks=ranks) for ranks in (1, 4))
    words = 4 * 8000 * 32
    assert four.bytes["weights"] <= one.bytes["weights"] - words / 2
    assert four.bytes["optimizer"] == pytest.approx(one.bytes["optimizer"] / 4, rel=0.02)


@pytest.mark.slow
def test_two_processes_need_what_the_plan_says(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "plan_truth_ranks.py"
    command = [sys.executable, script, "--ranks", "2", "--only", "0", "--result", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_rank_updates_its_share_of_the_largest_weight():
    wide = config(vocab_size=40_000)
    plan = replace(SMALL, dtype="bf16", optimizer="adamw-bf16", micro_batch_tokens=16)
    one, four = (footprint(wide, plan, ranks=ranks) for ranks in (1, 4))
    assert one.bytes["backward"] >= 2 * 4 * 40_000 * 32, "two copies in fp32"
    assert four.bytes["backward"] <= one.bytes["backward"] / 2


def fake_measure(costs):
    """Needs ``costs[name of the setting]`` GB less for each setting switched; 20 GB without."""

    def measure(plan):
        less = sum(gb for name, gb in costs.items() if getattr(plan, name) != getattr(SMALL, name))
        return Footprint(1, 1, {**dict.fromkeys(KINDS, 0), "weights": int((20 - less) * 1e9)})

    return measure


def switched(card_gb, costs):
    found = advise(SMALL, card_gb, fake_measure(costs))
    return found.fits, flags(SMALL, found.planned)


def test_a_plan_that_fits_needs_no_switch():
    assert switched(24, {}) == (True, [])


def test_the_first_switch_that_is_enough_is_taken():
    costs = {"gradient_checkpointing": 1, "optimizer": 8, "step_in_backward": 9}
    assert switched(16, costs) == (True, ["--optimizer adamw-8bit"]), "checkpointing is taken back"


def test_switches_that_help_together_stay_together():
    costs = {"gradient_checkpointing": 4, "optimizer": 4}
    both = ["--optimizer adamw-8bit", "--gradient-checkpointing"]
    assert switched(14, costs) == (True, both)


def test_4bit_weights_come_with_adapters():
    costs = {"quantize": 9}
    assert switched(16, costs) == (True, ["--lora-rank 16", "--quantize 4bit"])


@pytest.mark.slow
def test_what_is_advised_can_be_run():
    in_bf16 = replace(SMALL, optimizer="adamw-bf16", dtype="bf16")
    nothing = fake_measure({})(SMALL)

    def adapters_are_small(plan):
        size = int(1e9 if plan.lora_rank else 20e9)
        return replace(nothing, bytes={**nothing.bytes, "weights": size})

    found = advise(in_bf16, 16, adapters_are_small)
    assert flags(in_bf16, found.planned) == ["--optimizer adamw", "--lora-rank 16"]
    whole = replace(SMALL, micro_batch_tokens=2048, sequence_length=256)
    step = flags(whole, replace(whole, step_in_backward=True))
    assert step == ["--step-in-backward", "--batch-size 4"], "forget and retain: 8 x 256"
    longer = replace(whole, sequence_length=512, micro_batch_tokens=600)
    found = advise(longer, 16, fake_measure({"step_in_backward": 9, "micro_batch_tokens": 0}))
    assert flags(longer, found.planned) == [
        "--micro-batch-tokens 1024", "--step-in-backward", "--batch-size 1",
    ]  # fmt: skip
    sequences = [TokenizedExample(tuple(range(512)), 100, i) for i in range(3)]
    settings = TrainSettings(batch_size=1, micro_batch_tokens=1024, step_in_backward=True)
    data = {"forget": sequences, "retain": sequences}
    check_step_in_backward(data, build_method("NPO+RT"), settings)
    with pytest.raises(UserError, match="adapters are fp32"):
        replace(in_bf16, lora_rank=4)
    with pytest.raises(UserError, match="fp16 weights cannot be trained"):
        replace(SMALL, dtype="fp16")


def test_what_never_fits_says_so_with_the_least_that_was_found():
    found = advise(SMALL, 8, fake_measure({"lora_rank": 2, "quantize": 3}))
    assert not found.fits
    assert found.footprint.peak == pytest.approx(15e9)


@pytest.fixture
def folder(tmp_path):
    config().save_pretrained(tmp_path)
    return tmp_path


def test_the_command_prints_what_holds_the_memory_and_the_card(folder, capsys):
    assert main(["plan", "--model", str(folder), "--card", "24", "--lora-rank", "2"]) == 0
    out = capsys.readouterr().out
    assert "weights" in out
    assert "24 GB" in out


@pytest.mark.slow
def test_a_plan_that_does_not_fit_is_explained_on_one_screen(folder, capsys):
    assert main(["plan", "--model", str(folder), "--card", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "no, even with all of these" in out
    assert "--lora-rank 16 --quantize 4bit" in out
    assert len(out.splitlines()) <= 25
    assert max(map(len, out.splitlines())) <= 100


def test_the_bytes_in_json_add_up_to_the_peak(folder, capsys):
    assert main(["plan", "--model", str(folder / "config.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Counter(found["bytes"]).total() == found["peak_bytes"]
    assert found["peak_bytes"] + found["allowance_bytes"] == found["needed_bytes"]
    assert [card["card_gb"] for card in found["cards"]] == [12, 16, 24, 40, 48, 80]
    assert all(card["fits"] and card["fits_with"] == [] for card in found["cards"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "NPO+TR"], "did you mean NPO+RT?"),
        (["--sequence-length", "1"], "sequence_length must be at least 2, got 1"),
        (["--card", "0"], "card must be its memory in GB, such as 24, got 0"),
        (["--ranks", "0"], "ranks must be 1 or more, got 0"),
        (["--quantize", "4bit"], "4-bit weights cannot be trained themselves: add --lora-rank 16"),
        (["--model", "./nowhere"], "no model folder './nowhere'"),
        (["--model", "nowhere/config.json"], "no configuration file 'nowhere/config.json'"),
    ],
)
def test_mistakes_name_the_value_and_the_cure(folder, capsys, arguments, message):
    own = [] if "--model" in arguments else ["--model", str(folder)]
    assert exit_code(["plan", *own, *arguments]) == 2
    error = capsys.readouterr().err.replace("│", "")  # the sides of a box
    assert message in " ".join(error.split())


@pytest.mark.slow
def test_a_configuration_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert "not a causal language model" in capsys.readouterr().err


def test_impossible_plans_are_refused():
    with pytest.raises(UserError, match="micro_batch_tokens must be at least 1, got 0"):
        PlannedRun(micro_batch_tokens=0)
