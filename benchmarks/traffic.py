"""Counts what several GPUs send each other in a training step, and its flops, without a GPU.

A step of NPO+RT runs as rank 0 of several on tensors without data (``FakeTensorMode``) and with
PyTorch's fake process group: the package's own ``shard`` and ``take_step``. Every collective and
every matrix product is counted where PyTorch dispatches it. ``scale.py`` makes tables of it.
"""

import gc
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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

from npo_fast.data import TokenizedExample
from npo_fast.kernels.products import opmath_product
from npo_fast.methods import build_method
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.sharding import shard
from npo_fast.planner.model import empty_lm, empty_model
from npo_fast.planner.tracker import FlashAttention
from npo_fast.trainer.optimizers import build_optimizer
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.state import TrainState
from npo_fast.trainer.step import take_step
from npo_fast.trainer.update import Update

SEQUENCE, PROMPT = 256, 64  # tokens: as the planner has them
METHOD = "NPO+RT"
PASSES = 2  # of a step: one over the forget set, one over the retain set
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
    tokens: int = 2048  # of a pass, a rank
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
    gc.collect()  # a sharded model is full of cycles
    opmath_product.cache_clear()  # it has tried what tensors without data can do
    return StepCount(parameters, traffic, flops)


def count(lm: CausalLM, setup: Setup) -> tuple[Traffic, int]:
    """Runs a step of a model that is sharded, with data or without; returns what it cost."""
    flops = flop_counter()
    with CountTraffic(setup.ranks) as counter, flops, FlashAttention():
        step(lm, setup)
    return counter.traffic, flops.get_total_flops()


def count_by_depth(config: LlamaConfig, setup: Setup) -> StepCount:
    """``count_step`` from one and two layers: each layer adds what the second does."""
    one, two = (count_step(of_depth(config, layers), setup) for layers in (1, 2))
    more = config.num_hidden_layers - 2
    return StepCount(
        two.parameters + more * (two.parameters - one.parameters),
        two.traffic.deeper(one.traffic, more),
        two.flops + more * (two.flops - one.flops),
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
    shard(model, mesh)
    # what it does to its logits was known before: it cannot be measured without data
    lm.head = model.get_output_embeddings()
    lm.vocabulary_slice = lm.head.vocabulary
    lm.choose_attention("auto")
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
