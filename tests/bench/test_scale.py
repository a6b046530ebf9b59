"""What several processes send each other in a step: counted, against real processes and formulas.

The README's table of bytes over the wire is what is tested here.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from npo_fast.kernels.products import opmath_product
from npo_fast.losses import NPO
from npo_fast.model.adapters import add_lora
from npo_fast.ops import linear_sequence_loss
from npo_fast.ops.vocab_parallel import VocabularySlice, gather_rows
from tests.helpers import slow_but
from tests.trainer.test_distributed import on_ranks


def _load():
    file = Path(__file__).parents[2] / "benchmarks" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale", file)
    module = sys.modules["scale"] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


scale = _load()
WIDTH, VOCABULARY, RANKS, TOKENS = 64, 96, 8, 512  # no rows of a weight are left over
CONFIG = LlamaConfig(
    hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=False,
)  # fmt: skip
ANSWERS = TOKENS * (scale.SEQUENCE - scale.PROMPT) // scale.SEQUENCE
SETUPS = {
    "all weights": (0, False),
    "all weights, gradient checkpointing": (0, True),
    "LoRA": (4, False),
    "LoRA, gradient checkpointing": (4, True),
}


def setup_of(name: str, ranks: int = RANKS, **others):
    lora_rank, recompute = SETUPS[name]
    return scale.Setup(ranks, lora_rank, recompute, TOKENS, **others)


def _real_step(mesh, name: str):
    torch.manual_seed(0)
    setup = setup_of(name, mesh.size())
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    if setup.lora_rank:
        model = add_lora(model, "", setup.lora_rank)
    model.config.use_cache = False
    traffic, flops = scale.count(scale.sharded(model.train(), mesh, setup), setup)
    return traffic.as_dict(), flops


REAL = ["all weights, gradient checkpointing"]


@pytest.mark.parametrize("name", slow_but(REAL, SETUPS))
def test_two_real_processes_send_what_is_counted_without_data(name, tmp_path):
    without_data = scale.count_step(CONFIG, setup_of(name, 2))
    expected = without_data.traffic.as_dict(), without_data.flops
    assert on_ranks(2, tmp_path, _real_step, name) == [expected, expected]


def test_layers_are_gathered_twice_and_their_gradients_summed_in_fp32():
    counted = scale.count_step(CONFIG, setup_of("all weights"))
    parameters = counted.parameters - 2 * VOCABULARY * WIDTH  # but embedding and head
    expected = scale.PASSES * 4 * parameters * (RANKS - 1) / RANKS
    assert counted.traffic.sent("layers", "all_gather") == expected
    assert counted.traffic.sent("layers", "reduce_scatter") == expected


def test_gradient_checkpointing_gathers_no_layer_a_third_time():
    """FSDP2 has gathered the layer for its backward when the forward runs again."""
    kept = scale.count_step(CONFIG, setup_of("all weights"))
    again = scale.count_step(CONFIG, setup_of("all weights, gradient checkpointing"))
    assert kept.traffic == again.traffic
    assert kept.flops < again.flops


def test_fp32_weights_are_gathered_in_fp32():
    half = scale.count_step(CONFIG, setup_of("all weights")).traffic
    fp32 = scale.count_step(CONFIG, setup_of("all weights", dtype="fp32")).traffic
    gathered, summed = ("layers", "all_gather"), ("layers", "reduce_scatter")
    assert fp32.sent(*gathered) == 2 * half.sent(*gathered)
    assert fp32.sent(*summed) == half.sent(*summed)


def test_embedding_and_head_send_what_the_readme_says():
    traffic = scale.count_step(CONFIG, setup_of("all weights")).traffic
    longest = scale.PASSES * 2 * 8 * (RANKS - 1) / RANKS  # an all-reduce of one number
    ids = 8 * (RANKS - 1)
    a_token = 4 * (RANKS - 1) * WIDTH + ids
    assert traffic.sent("embedding") == scale.PASSES * TOKENS * a_token + longest
    an_answer = (RANKS - 1) * (6 * WIDTH + 8 * RANKS)
    assert traffic.sent("head") == scale.PASSES * ANSWERS * an_answer


def test_lora_sums_the_gradients_of_adapters_alone():
    traffic = scale.count_step(CONFIG, setup_of("LoRA")).traffic
    layer = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "gate": (64, 128),
             "up": (64, 128), "down": (128, 64)}  # fmt: skip
    adapters = CONFIG.num_hidden_layers * sum(
        # a tensor of 4 rows, for 8 ranks, is filled up to 8
        RANKS * inputs + 4 * outputs
        for inputs, outputs in layer.values()
    )
    expected = scale.PASSES * 4 * adapters * (RANKS - 1) / RANKS
    assert traffic.sent("layers", "reduce_scatter") == expected
    assert traffic.calls["embedding", "reduce_scatter"] == scale.PASSES  # and no backward
    assert traffic.calls["embedding", "all_gather"] == scale.PASSES


def test_the_head_alone_sends_what_the_readme_says():
    rows, sequences = 96, 4  # of each rank
    with scale.fake_ranks(RANKS) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        vocabulary = VocabularySlice(mesh.get_group(), VOCABULARY)
        own = torch.empty(rows, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocabulary.rows, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(RANKS * rows, dtype=torch.int64)
        offsets = torch.arange(0, RANKS * rows + 1, rows // sequences)
        with scale.CountTraffic(RANKS) as counter:
            value, _ = linear_sequence_loss(
                gather_rows(own, [rows] * RANKS, mesh.get_group()), weight, labels, offsets,
                NPO(0.1), ref_log_probs=torch.zeros(RANKS * sequences), vocabulary=vocabulary,
            )  # fmt: skip
            value.backward()
    opmath_product.cache_clear()
    assert counter.traffic.sent("head") == rows * (RANKS - 1) * (6 * WIDTH + 8 * RANKS)
    assert {part for part, _ in counter.traffic.calls} == {"head"}


def test_products_are_counted_once_forward_and_twice_backward():
    counted = scale.count_step(CONFIG, setup_of("all weights"))
    norms = (2 * CONFIG.num_hidden_layers + 1) * WIDTH
    multiplied = counted.parameters - 2 * VOCABULARY * WIDTH - norms
    # scores and their product with the values: forward two, backward five products
    attention = 7 * 2 * WIDTH * scale.SEQUENCE * TOKENS * CONFIG.num_hidden_layers
    expected = 6 * multiplied * TOKENS + attention + 6 * VOCABULARY * WIDTH * ANSWERS
    assert counted.flops == scale.PASSES * expected


@pytest.mark.parametrize("name", slow_but(["LoRA"], SETUPS))
def test_layers_cost_the_same_each(name):
    deep = scale.of_depth(CONFIG, 5)
    assert scale.count_by_depth(deep, setup_of(name)) == scale.count_step(deep, setup_of(name))


def test_from_the_break_even_on_flops_take_longer_than_links():
    case = scale.Case(
        "", setup_of("all weights"), scale.count_step(CONFIG, setup_of("all weights"))
    )
    link = 2 * case.all_token_bytes / case.token_flops * scale.GPU_FLOPS_PER_S
    tokens = case.break_even_tokens(link)
    links, flops = case.seconds(tokens, link)
    assert links == pytest.approx(flops, rel=0.01)
    assert case.break_even_tokens(link / 3) is None
