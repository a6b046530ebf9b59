"""What several GPUs send each other in a training step, counted, and when that decides the time.

    python benchmarks/scale.py                # counts; writes benchmarks/results/scale.json
    python benchmarks/scale.py --page docs/scale.md      # writes the page from that file alone

A step of NPO+RT runs as rank 0 of 8, 16 or 64 on tensors without data (``FakeTensorMode``) and
with PyTorch's fake process group: the package's own ``shard`` and ``take_step``. Every collective
and every matrix product is counted where PyTorch dispatches it. No weights, no GPU, no network.
"""

import argparse
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig

from npo_fast.bench.provenance import provenance
from npo_fast.data import TokenizedExample
from npo_fast.kernels.products import opmath_product
from npo_fast.methods import build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.sharding import shard
from npo_fast.ops.cost import FLOPS_PER_S
from npo_fast.planner import PlannedRun, footprint
from npo_fast.planner.memory import GIB
from npo_fast.planner.model import empty_lm, empty_model
from npo_fast.planner.tracker import FlashAttention
from npo_fast.trainer.optimizers import build_optimizer
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.state import TrainState
from npo_fast.trainer.step import take_step
from npo_fast.trainer.update import Update

RESULT = Path(__file__).parent / "results" / "scale.json"
CONFIGS = {
    "Llama-2-7B": LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=32000, tie_word_embeddings=False,
    ),
    "Llama-3.1-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ),
    "Llama-3.1-405B": LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ),
}  # fmt: skip
LORA_RANK = 16
# bytes a second that a GPU can send, one way, an H100: NVLink 4 within a node of 8; between nodes a
# network card of 400 Gb/s a GPU, taken by one ring after all GPUs, or by eight rings side by side
NVLINK, ONE_CARD, EIGHT_CARDS = 450e9, 50e9, 400e9
LINKS = {8: (NVLINK,), 16: (ONE_CARD, EIGHT_CARDS), 64: (ONE_CARD, EIGHT_CARDS)}
GPU_FLOPS_PER_S = FLOPS_PER_S[2]
SEQUENCE, PROMPT = 256, 64  # tokens: as the planner has them
TOKENS = 2048  # a pass that is counted
SHOWN_TOKENS = (2048, 16384)
METHOD = "NPO+RT"
PASSES = 2  # of a step: one over the forget set, one over the retain set


# ---- counting ------------------------------------------------------------------------------------

# name of a collective -> its kind, and the argument whose bytes are those of all ranks together
COLLECTIVES = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "all_reduce": ("all_reduce", 0),
}
LOCAL = {"wait_tensor", "_wrap_tensor_autograd"}
# the autograd function that a collective belongs to -> the part of the model
FUNCTIONS = {
    "_EmbeddingBackward": "embedding",
    "_GatherRowsBackward": "head",
    "OnePassBackward": "head",
}


@dataclass
class Traffic:
    """Collectives of one of ``ranks`` ranks, by part of the model and kind."""

    ranks: int
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    whole: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Bytes of all ranks together: what is gathered, scattered or reduced."""

    def sent(self, part: str, kind: str | None = None) -> float:
        """Bytes that the rank sends, where the ranks form a ring; it receives as many."""
        return sum(
            size * (self.ranks - 1) * (2 if found == "all_reduce" else 1) / self.ranks
            for (name, found), size in self.whole.items()
            if name == part and kind in (None, found)
        )

    def deeper(self, other: "Traffic", times: int) -> "Traffic":
        """This plus ``times`` what it has more than ``other``."""
        return Traffic(
            self.ranks,
            *(
                Counter({key: mine[key] + times * (mine[key] - theirs[key]) for key in mine})
                for mine, theirs in ((self.calls, other.calls), (self.whole, other.whole))
            ),
        )

    def as_dict(self) -> dict[str, Any]:
        """Calls and bytes sent, by "part, kind"."""
        return {
            f"{part}, {kind}": {"calls": count, "sent_bytes": round(self.sent(part, kind))}
            for (part, kind), count in sorted(self.calls.items())
        }


class CountTraffic(TorchDispatchMode):
    """Counts collectives where they are dispatched, with data or without.

    Tensors without data have no values. The checks of the package ask whether something holds and
    are told that it does; what a step reports (loss, norm) is 1.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.traffic = Traffic(ranks)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its collectives come here one by one
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.__name__.partition(".")[0], args)
        elif func is torch.ops.aten._local_scalar_dense.default and without_data(args[0]):
            if args[0].dtype == torch.bool:
                return True
            if args[0].dtype.is_floating_point:
                return 1.0
        return func(*args, **kwargs or {})

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        if name in LOCAL:
            return
        kind, which = COLLECTIVES[name]  # a collective that is not known here is an error
        tensors = args[which] if isinstance(args[which], list) else [args[which]]
        key = part_of_model(), kind
        self.traffic.calls[key] += 1
        self.traffic.whole[key] += sum(tensor.nbytes for tensor in tensors)


def without_data(tensor: Tensor) -> bool:
    return hasattr(tensor, "fake_mode")


def part_of_model() -> str:
    """Whose collective this is, by the Python frames that lead to it."""
    frame: Any = sys._getframe()
    while frame is not None:
        if "_fully_shard" in frame.f_code.co_filename:
            return "layers"
        function = type(frame.f_locals.get("ctx")).__name__
        if function in FUNCTIONS:
            return FUNCTIONS[function]
        frame = frame.f_back
    return "norm"


def product_flops(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of whole squares: a kernel that skips what is masked does half."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(
    upstream: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    """Of whole squares."""
    return sdpa_backward_flop_count(upstream, query, key, value)


def head_flops(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of the operator that makes log-probs and keeps no logits."""
    return 2 * hidden[0] * hidden[1] * weight[0]


def head_backward_flops(g: Any, hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 3 * head_flops(hidden, weight)


def flop_counter() -> FlopCounterMode:
    """PyTorch's, with the operators that it does not know."""
    ops, own = torch.ops.aten, torch.ops.npo_fast
    return FlopCounterMode(
        display=False,
        custom_mapping={
            ops.addmm_: product_flops,
            ops._scaled_dot_product_flash_attention_for_cpu: attention_flops,
            ops._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
            own.linear_log_probs: head_flops,
            own.linear_log_probs_backward: head_backward_flops,
        },
    )


# ---- a step on tensors without data --------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What decides the traffic of a step."""

    ranks: int
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    tokens: int = TOKENS
    dtype: str = "bf16"


@dataclass
class StepCount:
    """What one rank does in one step."""

    parameters: int
    traffic: Traffic
    flops: int


def count_step(config: LlamaConfig, setup: Setup) -> StepCount:
    """Runs a step as rank 0 of ``setup.ranks`` without data."""
    model = empty_model(config, setup.dtype, setup.lora_rank)
    parameters = sum(p.numel() for p in model.parameters())
    with fake_ranks(setup.ranks) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        traffic, flops = count(sharded(model, mesh, setup), setup)
    opmath_product.cache_clear()  # it has tried what tensors without data can do
    return StepCount(parameters, traffic, flops)


def count(lm: CausalLM, setup: Setup) -> tuple[Traffic, int]:
    """Runs a step of a model that is sharded, with data or without; returns what it cost."""
    flops = flop_counter()
    with CountTraffic(setup.ranks) as counter, flops, FlashAttention():
        step(lm, setup)
    return counter.traffic, flops.get_total_flops()


def count_by_depth(config: LlamaConfig, setup: Setup) -> StepCount:
    """``count_step`` from two and three layers: each layer adds what the third does."""
    two, three = (count_step(of_depth(config, layers), setup) for layers in (2, 3))
    more = config.num_hidden_layers - 3
    return StepCount(
        three.parameters + more * (three.parameters - two.parameters),
        three.traffic.deeper(two.traffic, more),
        three.flops + more * (three.flops - two.flops),
    )


def of_depth(config: LlamaConfig, layers: int) -> LlamaConfig:
    """The configuration with so many layers."""
    return LlamaConfig(**{**config.to_dict(), "num_hidden_layers": layers})


@contextmanager
def fake_ranks(ranks: int) -> Iterator[DeviceMesh]:
    """Inside, this process is rank 0 of so many; collectives return at once and move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def sharded(model: Any, mesh: DeviceMesh, setup: Setup) -> CausalLM:
    """The model after the package's ``shard``.

    One from the meta device has no data afterwards either: FSDP2 takes no meta tensors, so call it
    in a ``FakeTensorMode``, whose tensors say that they are on the CPU.
    """
    lm = empty_lm(model, setup.gradient_checkpointing)
    if lm.device.type == "meta":
        model.to_empty(device="cpu")
    shard(lm, mesh)
    return lm


def step(lm: CausalLM, setup: Setup) -> None:
    """One step: for each rank a pass of ``setup.tokens`` over each set."""
    count = setup.ranks * setup.tokens // SEQUENCE
    examples = [TokenizedExample((0,) * SEQUENCE, PROMPT, i) for i in range(count)]
    terms = build_method(METHOD)
    batch: dict[str, Any] = {source: examples for term in terms for source in term.reads}
    references: dict[str, Any] = {source: torch.full((count,), -1.0) for source in batch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about rounding
        optimizer = build_optimizer(lm.model, "adamw", 1e-5, 0.01)
    deal = lm.micro_batches  # reads lengths

    def deal_real_tokens(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return deal(*arguments)

    lm.micro_batches = deal_real_tokens  # type: ignore[assignment, method-assign]
    settings, state = TrainSettings(), TrainState(0, setup.tokens)
    take_step(lm, batch, terms, settings, state, Update(optimizer, 1.0), references)


# ---- bytes and flops as time ---------------------------------------------------------------------


@dataclass
class Case:
    """One model and setup: what a pass costs, as ``layers_bytes + tokens * token_bytes``."""

    model: str
    setup: Setup
    count: StepCount

    @property
    def layers_bytes(self) -> float:
        """Sent a pass, however many tokens it has."""
        return self.count.traffic.sent("layers") / PASSES

    def token_bytes(self, part: str) -> float:
        """Sent for each token of a pass."""
        return self.count.traffic.sent(part) / PASSES / self.setup.tokens

    @property
    def all_token_bytes(self) -> float:
        return self.token_bytes("embedding") + self.token_bytes("head")

    @property
    def token_flops(self) -> float:
        return self.count.flops / PASSES / self.setup.tokens

    def seconds(self, tokens: int, link: float) -> tuple[float, float]:
        """Of a pass: by links of so many bytes a second alone, by the flops alone."""
        sent = self.layers_bytes + tokens * self.all_token_bytes
        return sent / link, tokens * self.token_flops / GPU_FLOPS_PER_S

    def break_even_tokens(self, link: float) -> int | None:
        """Tokens of a pass from which the flops take longer; None where they never do."""
        a_token = self.token_flops / GPU_FLOPS_PER_S * link
        if a_token <= self.all_token_bytes:
            return None
        return math.ceil(self.layers_bytes / (a_token - self.all_token_bytes))

    def needed_gib(self, tokens: int) -> float:
        """What a GPU must have for passes of so many tokens, as ``npo-fast plan`` says."""
        planned = PlannedRun(
            method=METHOD, optimizer="adamw" if self.setup.lora_rank else "adamw-bf16",
            micro_batch_tokens=tokens, sequence_length=SEQUENCE, lora_rank=self.setup.lora_rank,
            gradient_checkpointing=self.setup.gradient_checkpointing,
        )  # fmt: skip
        return footprint(CONFIGS[self.model], planned, self.setup.ranks).needed / GIB

    def as_dict(self) -> dict[str, Any]:
        """What is counted, and what follows from it for bf16, whose rate is assumed."""
        half = self.setup.dtype == "bf16"
        return {
            "model": self.model, "parameters": self.count.parameters,
            **asdict(self.setup), "collectives_of_a_step": self.count.traffic.as_dict(),
            "flops_of_a_step": self.count.flops,
            "layers_bytes_of_a_pass": round(self.layers_bytes),
            "embedding_bytes_of_a_token": round(self.token_bytes("embedding")),
            "head_bytes_of_a_token": round(self.token_bytes("head")),
            "flops_of_a_token": round(self.token_flops),
            "links": [self._over(link) for link in LINKS[self.setup.ranks] if half],
        }  # fmt: skip

    def _over(self, link: float) -> dict[str, Any]:
        tokens = self.break_even_tokens(link)
        gib = None if tokens is None else self.needed_gib(-(-tokens // SEQUENCE) * SEQUENCE)
        times = {str(n): self.seconds(n, link) for n in SHOWN_TOKENS}
        return {
            "bytes_per_s": link, "break_even_tokens": tokens,
            "break_even_gib": None if gib is None else round(gib, 1),
            "links_s": {n: round(links, 4) for n, (links, _) in times.items()},
            "flops_s": {n: round(flops, 4) for n, (_, flops) in times.items()},
        }  # fmt: skip


def measure() -> dict[str, Any]:
    """All cases, and checks of what they assume."""
    setups = [
        (name, Setup(ranks, lora_rank, recompute))
        for name in CONFIGS
        for ranks in LINKS
        for lora_rank in (0, LORA_RANK)
        for recompute in (False, True)
    ]
    cases = []
    for name, setup in [*setups, ("Llama-2-7B", Setup(8, dtype="fp32"))]:
        cases.append(Case(name, setup, count_by_depth(CONFIGS[name], setup)).as_dict())
        print(name, setup, [link["break_even_tokens"] for link in cases[-1]["links"]], flush=True)
    return {
        "assumed": {
            "flops_per_s": GPU_FLOPS_PER_S, "method": METHOD, "sequence_tokens": SEQUENCE,
            "prompt_tokens": PROMPT, "tokens_of_a_counted_pass": TOKENS,
        },
        "checks": checks(), "cases": cases,
    }  # fmt: skip


def checks() -> dict[str, bool]:
    """Whether depth and tokens do what the cases take them to do."""
    small, large = CONFIGS["Llama-2-7B"], CONFIGS["Llama-3.1-70B"]
    whole = {
        f"Llama-2-7B, all layers, LoRA {lora_rank}, checkpointing {recompute}": (small, setup)
        for lora_rank in (0, LORA_RANK)
        for recompute in (False, True)
        for setup in [Setup(8, lora_rank, recompute)]
    }
    whole["Llama-3.1-70B, all layers"] = large, Setup(16, 0, True)
    found = {
        name: count_step(config, setup) == count_by_depth(config, setup)
        for name, (config, setup) in whole.items()
    }
    once, twice = (Case("", setup, count_by_depth(large, setup))
                   for setup in (Setup(64), Setup(64, tokens=2 * TOKENS)))  # fmt: skip
    found["twice the tokens: the same bytes of layers"] = once.layers_bytes == twice.layers_bytes
    ids = 2 * 8 * 63 / 64  # the longest pack's length goes around once a pass
    found["twice the tokens: twice the bytes of embedding and head"] = all(
        abs(once.token_bytes(part) - twice.token_bytes(part)) <= ids / TOKENS
        for part in ("embedding", "head")
    )
    found["twice the tokens: twice the flops"] = once.token_flops == twice.token_flops
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="write this page from the result; count nothing")
    page = parser.parse_args().page
    if page is None:
        RESULT.write_text(json.dumps({**measure(), **provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
