"""What several processes send each other in a step: counted, against real processes and formulas.

The formulas of ``docs/several_gpus.md`` are tested here, and the tables of ``docs/scale.md``.
"""

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from npo_fast import distributed
from npo_fast.kernels.products import opmath_product
from npo_fast.losses import NPO
from npo_fast.model.adapters import add_lora
from npo_fast.ops import linear_sequence_loss
from npo_fast.ops.vocab_parallel import VocabularySlice, gather_rows
from tests.helpers import slow_but

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import scale  # noqa: E402
import traffic  # noqa: E402

sys.path.remove(str(BENCHMARKS))
WIDTH, VOCABULARY, RANKS, TOKENS = 64, 96, 8, 512  # no rows of a weight are left over
CONFIG = LlamaConfig(
    hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=False,
)  # fmt: skip
ANSWERS = TOKENS * (traffic.SEQUENCE - traffic.PROMPT) // traffic.SEQUENCE
SETUPS = {
    "all weights": (0, False),
    "all weights, gradient checkpointing": (0, True),
    "LoRA": (4, False),
    "LoRA, gradient checkpointing": (4, True),
}


def setup_of(name: str, ranks: int = RANKS, **others):
    lora_rank, recompute = SETUPS[name]
    return traffic.Setup(ranks, lora_rank, recompute, TOKENS, **others)


@cache
def counted_step(name: str, **others):
    return traffic.count_step(CONFIG, setup_of(name, **others))


def _real_step(rank: int, folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    setup, store = setup_of(name, 2), f"file://{folder / 'meeting'}"
    mesh = distributed.init_process_group(
        torch.device("cpu"), init_method=store, rank=rank, world_size=2
    )
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    if setup.lora_rank:
        model = add_lora(model, "", setup.lora_rank)
    model.config.use_cache = False
    sent, flops = traffic.count(traffic.sharded(model.train(), mesh, setup), setup)
    (folder / f"{rank}.json").write_text(json.dumps([sent.as_dict(), flops]))
    distributed.destroy_process_group()


REAL = ["all weights, gradient checkpointing"]


@pytest.mark.parametrize("name", slow_but(REAL, SETUPS))
def test_two_real_processes_send_what_is_counted_without_data(name, tmp_path):
    torch.multiprocessing.spawn(_real_step, (tmp_path, name), nprocs=2)
    without_data = counted_step(name, ranks=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [without_data.traffic.as_dict(), without_data.flops]


def test_layers_are_gathered_twice_and_their_gradients_summed_in_fp32():
    counted = counted_step("all weights")
    parameters = counted.parameters - 2 * VOCABULARY * WIDTH  # but embedding and head
    expected = traffic.PASSES * 4 * parameters * (RANKS - 1) / RANKS
    assert counted.traffic.sent("layers", "all_gather") == expected
    assert counted.traffic.sent("layers", "reduce_scatter") == expected


def test_gradient_checkpointing_gathers_no_layer_a_third_time():
    """FSDP2 has gathered the layer for its backward when the forward runs again."""
    kept = counted_step("all weights")
    again = counted_step("all weights, gradient checkpointing")
    assert kept.traffic == again.traffic
    assert kept.flops < again.flops


def test_fp32_weights_are_gathered_in_fp32():
    half = counted_step("all weights").traffic
    fp32 = counted_step("all weights", dtype="fp32").traffic
    gathered, summed = ("layers", "all_gather"), ("layers", "reduce_scatter")
    assert fp32.sent(*gathered) == 2 * half.sent(*gathered)
    assert fp32.sent(*summed) == half.sent(*summed)


def test_embedding_and_head_send_what_the_page_says():
    found = counted_step("all weights").traffic
    longest = traffic.PASSES * 2 * 8 * (RANKS - 1) / RANKS  # an all-reduce of one number
    ids = 8 * (RANKS - 1)
    a_token = 4 * (RANKS - 1) * WIDTH + ids
    assert found.sent("embedding") == traffic.PASSES * TOKENS * a_token + longest
    an_answer = (RANKS - 1) * (6 * WIDTH + 8 * RANKS)
    assert found.sent("head") == traffic.PASSES * ANSWERS * an_answer


def test_lora_sums_the_gradients_of_adapters_alone():
    found = counted_step("LoRA").traffic
    layer = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "gate": (64, 128),
             "up": (64, 128), "down": (128, 64)}  # fmt: skip
    adapters = CONFIG.num_hidden_layers * sum(
        # a tensor of 4 rows, for 8 ranks, is filled up to 8
        RANKS * inputs + 4 * outputs
        for inputs, outputs in layer.values()
    )
    expected = traffic.PASSES * 4 * adapters * (RANKS - 1) / RANKS
    assert found.sent("layers", "reduce_scatter") == expected
    assert found.calls["embedding", "reduce_scatter"] == traffic.PASSES  # and no backward
    assert found.calls["embedding", "all_gather"] == traffic.PASSES


def test_the_head_alone_sends_what_the_page_says():
    rows, sequences = 96, 4  # of each rank
    with traffic.fake_ranks(RANKS) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        vocabulary = VocabularySlice(mesh.get_group(), VOCABULARY)
        own = torch.empty(rows, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocabulary.rows, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(RANKS * rows, dtype=torch.int64)
        offsets = torch.arange(0, RANKS * rows + 1, rows // sequences)
        with traffic.CountTraffic(RANKS) as counter:
            value, _ = linear_sequence_loss(
                gather_rows(own, [rows] * RANKS, mesh.get_group()), weight, labels, offsets,
                NPO(0.1), ref_log_probs=torch.zeros(RANKS * sequences), vocabulary=vocabulary,
            )  # fmt: skip
            value.backward()
    opmath_product.cache_clear()
    assert counter.traffic.sent("head") == rows * (RANKS - 1) * (6 * WIDTH + 8 * RANKS)
    assert {part for part, _ in counter.traffic.calls} == {"head"}


def test_products_are_counted_once_forward_and_twice_backward():
    counted = counted_step("all weights")
    norms = (2 * CONFIG.num_hidden_layers + 1) * WIDTH
    multiplied = counted.parameters - 2 * VOCABULARY * WIDTH - norms
    # scores and their product with the values: forward two, backward five products
    attention = 7 * 2 * WIDTH * traffic.SEQUENCE * TOKENS * CONFIG.num_hidden_layers
    expected = 6 * multiplied * TOKENS + attention + 6 * VOCABULARY * WIDTH * ANSWERS
    assert counted.flops == traffic.PASSES * expected


@pytest.mark.parametrize("name", slow_but(["all weights"], SETUPS))
def test_layers_cost_the_same_each(name):
    deep = traffic.of_depth(CONFIG, 4)
    assert traffic.count_by_depth(deep, setup_of(name)) == traffic.count_step(deep, setup_of(name))


def test_from_the_break_even_on_flops_take_longer_than_links():
    case = scale.Case("", setup_of("all weights"), counted_step("all weights"))
    link = 2 * case.all_token_bytes / case.token_flops * scale.GPU_FLOPS_PER_S
    tokens = case.break_even_tokens(link)
    links, flops = case.seconds(tokens, link)
    assert links == pytest.approx(flops, rel=0.01)
    assert case.break_even_tokens(link / 3) is None


def test_the_page_has_the_tables_of_the_result():
    page = (BENCHMARKS.parent / "docs" / "scale.md").read_text()
    result = json.loads(scale.RESULT.read_text())
    assert scale.with_tables(page, result) == page
    assert all(result["checks"].values())
