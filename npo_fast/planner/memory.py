"""Peak memory of a training step, by kind, from the step's own code on tensors without data.

On the meta device a tensor has a shape and no bytes, and every operator runs as on a GPU: the
decoder, its backward, and the fused loss with a GPU's chunks, layouts and dtypes. Two things are
computed by formula: optimizer states (``state_bytes``) and temporaries inside of operators
(``tracker.workspace_bytes``). What FSDP2 gathers and frees is in ``ranks``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from npo_fast.data import PackedBatch, TokenizedExample, micro_batches
from npo_fast.errors import UserError, first_line
from npo_fast.losses import KL
from npo_fast.methods import Term, build_method
from npo_fast.model.adapters import Quantize
from npo_fast.model.attention import NAME
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.layers import repeated_layers
from npo_fast.ops.vocab_parallel import gather_rows
from npo_fast.planner.model import empty_lm, empty_model
from npo_fast.planner.ranks import ShardedLayers, local_shape, slice_vocabulary
from npo_fast.planner.tracker import FlashAttention, Tracker
from npo_fast.trainer.optimizers import Optimizer
from npo_fast.trainer.order import batch_keys
from npo_fast.trainer.step import layer_of, micro_batch_loss
from npo_fast.validation import Bound, Checked, NonNegativeFloat, NonNegativeInt, PositiveInt

GIB = 1 << 30
KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "head": "loss and LM head",
    "backward": "backward temporaries",
    "reference": "reference",
    "copy": "copy of the weights",
}
WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, HEAD, BACKWARD, REFERENCE, COPY = KINDS
CONTEXT_BYTES = 600 << 20  # CUDA context, loaded kernels, cuBLAS workspaces
FRAGMENTATION = 0.1  # of all bytes that are freed within a step


@dataclass(frozen=True)
class PlannedRun(Checked):
    """The run to plan for; these are options of unlearn."""

    method: str = "NPO+RT"
    """Method of unlearn, which decides whether a reference model is needed."""
    optimizer: Optimizer = "adamw"
    """Optimizer; adamw-8bit and adamw-bf16 need less memory."""
    micro_batch_tokens: PositiveInt = 2048
    """Tokens that go through the model at a time."""
    sequence_length: Annotated[int, Bound("at least 2", lambda length: length >= 2)] = 256
    """Tokens of a sequence: a quarter of them prompt, the rest answer."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of the weights."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward instead of keeping them."""
    step_in_backward: bool = False
    """Apply each gradient as soon as it is computed, then free it."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in CPU memory."""
    sharpness_rho: NonNegativeFloat = 0.0
    """Sharpness-aware steps: they copy the weights that are trained."""
    lora_rank: NonNegativeInt = 0
    """Train LoRA adapters of this rank instead of the weights; 0 trains all weights."""
    quantize: Quantize = "none"
    """"4bit" loads the weights below the adapters as NF4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == "fp16" and not self.lora_rank:
            raise UserError("fp16 weights cannot be trained: use --dtype bf16 or --lora-rank 16")
        if self.optimizer == "adamw-bf16" and (self.lora_rank or self.dtype != "bf16"):
            raise UserError(
                "--optimizer adamw-bf16 trains bf16 weights, and adapters are fp32: use --dtype "
                "bf16 without --lora-rank, or another --optimizer"
            )
        if self.sharpness_rho and self.step_in_backward:
            raise UserError("--sharpness-rho does not go with --step-in-backward: leave one out")
        if self.quantize != "none" and not self.lora_rank:
            raise UserError("4-bit weights cannot be trained themselves: add --lora-rank 16")
        build_method(self.method)


@dataclass(frozen=True)
class Footprint:
    """Bytes by kind at the moment of the peak, with the number of parameters.

    ``whole_bytes`` are those of 4-bit weights that several GPUs share, which each has whole while
    it loads them.
    """

    parameters: int
    trained: int
    bytes: dict[str, int]
    whole_bytes: int = 0

    @property
    def peak(self) -> int:
        """Sum of all kinds."""
        return sum(self.bytes.values())

    @property
    def allowance(self) -> int:
        """Bytes beyond tensors on a GPU: the context, and gaps between tensors."""
        moving = (self.bytes[kind] for kind in (ACTIVATIONS, HEAD, BACKWARD))
        return CONTEXT_BYTES + int(FRAGMENTATION * sum(moving))

    @property
    def needed(self) -> int:
        """What a GPU must have."""
        return max(self.peak + self.allowance, self.whole_bytes + CONTEXT_BYTES)


def footprint(config: Any, planned: PlannedRun, ranks: int = 1) -> Footprint:
    """Runs one micro-batch as in the middle of training, and counts its bytes.

    Weights, optimizer states and the gradients of earlier micro-batches exist already. With
    ``step_in_backward`` the whole step (``micro_batch_tokens``) goes through the model at once and
    back twice: for the gradient norm, and to update.

    ``config`` is a transformers configuration. Where ``ranks`` GPUs share the model (FSDP), the
    bytes are those of one.

    Raises:
        UserError: a model that cannot be built, or whose code reads values of tensors.
    """
    if ranks < 1:
        raise UserError(f"ranks must be 1 or more, got {ranks}")
    model = empty_model(config, planned.dtype, planned.lora_rank, planned.quantize)
    step = TrackedStep(empty_lm(model, planned.gradient_checkpointing), planned, ranks)
    try:
        with step.tracker:
            step.run()
    except RuntimeError as error:
        name = type(model).__name__
        if NAME in str(error):
            raise UserError(f"{name} cannot be planned: {error}") from error
        if "meta" not in str(error):
            raise
        raise UserError(
            f"{name} reads values of tensors while it runs, so it cannot run without data: "
            f"{first_line(error)}"
        ) from error
    return step.footprint()


def state_bytes(parameter: Tensor, optimizer: Optimizer) -> int:
    """Bytes of the two states that AdamW keeps for a weight.

    ``adamw``: in the weight's dtype. ``adamw-bf16``: in bf16. ``adamw-8bit`` (torchao): one byte
    per value and an fp32 scale per block of 256; tensors with fewer than 4096 values, or not a
    multiple of 256, are kept in the weight's dtype. torchao's 8-bit class does not run without
    data; ``benchmarks/plan_truth.py`` checks this formula against it.
    """
    values = parameter.numel()
    if optimizer == "adamw-8bit" and values >= 4096 and values % 256 == 0:
        return 2 * (values + 4 * (values // 256))
    size = 2 if optimizer == "adamw-bf16" else parameter.element_size()
    return 2 * values * size


class TrackedStep:
    """One step of the training loop, its memory counted by a ``Tracker``."""

    def __init__(self, lm: CausalLM, planned: PlannedRun, ranks: int = 1) -> None:
        self.lm, self.planned, self.ranks, self.tracker = lm, planned, ranks, Tracker()
        self.terms = build_method(planned.method)
        self.layer = layer_of(lm, self.terms)
        weights = list(lm.model.parameters())
        packed = sum(p.numel() for p in weights if p.dtype == torch.uint8)  # two weights a byte
        self.parameters = packed + sum(p.numel() for p in weights)
        self.trained_parameters = sum(p.numel() for p in _trained(lm, self.layer))
        self.sharded: ShardedLayers | None = None
        self.whole_bytes = 0
        if ranks > 1:
            if packed:
                self.whole_bytes = sum(t.nbytes for t in (*weights, *lm.model.buffers()))
            slice_vocabulary(lm, ranks)
            self.sharded = ShardedLayers(
                lm, self.tracker, ranks, (WEIGHTS, GRADIENTS, BACKWARD), self._reduced,
                planned.offload_optimizer,
            )  # fmt: skip
        for tensor in (*lm.model.parameters(), *lm.model.buffers()):
            if not self._is_sharded(tensor):
                self.tracker.hold(tensor, WEIGHTS)
        self.trained = _trained(lm, self.layer)
        self.prompt_length = max(1, planned.sequence_length // 4)
        self.gradients: dict[Tensor, Tensor] = {}  # shares of them
        sizes = [
            state_bytes(self._share(p), planned.optimizer)
            for p in self.trained
            if not (planned.offload_optimizer and self._is_sharded(p))
        ]
        self.states = [  # kept alive here: nothing else refers to them
            self.tracker.hold(torch.empty(size, dtype=torch.uint8, device="meta"), OPTIMIZER)
            for size in ([max(sizes, default=0)] if planned.offload_optimizer else sizes)
        ]
        if planned.sharpness_rho and not planned.offload_optimizer:  # with it the CPU has them
            self.states += [
                self.tracker.hold(torch.empty_like(self._share(p), requires_grad=False), COPY)
                for p in self.trained
            ]
        lm.decoder.register_forward_pre_hook(lambda *_: self._count_as(ACTIVATIONS))
        lm.decoder.register_forward_hook(lambda *_: self._count_as(HEAD))
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._accumulated)

    def run(self) -> None:
        """Runs the step; ``tracker`` must be entered."""
        groups = [[t for t in self.terms if t.batch_key == key] for key in batch_keys(self.terms)]
        if self.planned.step_in_backward:
            self.backward(self._whole_step(groups))
            return
        self.fill_gradients()
        distinct = {  # groups that need the same memory once: NPO and retain NLL are alike
            tuple(
                (
                    isinstance(t.loss, KL),
                    t.loss.reference == "hidden",
                    t.positions,
                    len(t.batch_key),
                )
                for t in group
            ): group
            for group in groups
        }
        for group in distinct.values():
            micro = self._micro(len(group[0].batch_key), self.planned.micro_batch_tokens)
            self.backward(self._loss(group, micro))
        self.update(max(self.trained, key=lambda p: self._share(p).numel()))

    def fill_gradients(self) -> None:
        """Makes the gradients of earlier micro-batches."""
        for parameter in self.trained:
            if self._is_sharded(parameter):
                self._reduced(parameter)
            else:
                parameter.grad = self.tracker.hold(torch.empty_like(parameter), GRADIENTS)

    def footprint(self) -> Footprint:
        """What the tracker has counted."""
        return Footprint(
            parameters=self.parameters,
            trained=self.trained_parameters,
            bytes={kind: self.tracker.at_peak[kind] for kind in KINDS},
            whole_bytes=self.whole_bytes,
        )

    def _whole_step(self, groups: list[list[Term]]) -> Tensor:
        """All sets go through the decoder together, so that one backward pass can update."""
        share = max(1, self.planned.micro_batch_tokens // len(groups))
        micros = [self._micro(len(group[0].batch_key), share) for group in groups]
        sizes = [len(micro.input_ids) for micro in micros]
        with FlashAttention():
            joined = self._micro(1, sum(sizes)).to(self.lm.device)
            parts = self.lm.states(joined, self.layer).split(sizes)
        losses = [self._loss(*part) for part in zip(groups, micros, parts, strict=True)]
        return torch.stack(losses).sum()

    def _micro(self, group: int, tokens: int) -> PackedBatch:
        """A pack of sequences in groups of ``group``, with about so many tokens on each rank."""
        length = self.planned.sequence_length
        count = group * max(1, tokens // (length * group))
        sequences = [
            TokenizedExample((0,) * length, self.prompt_length, i // group)
            for i in range(self.ranks * count)
        ]
        (micro,) = micro_batches(sequences, count * length, group, self.ranks)
        return micro

    def _loss(self, terms: list[Term], micro: PackedBatch, states: Tensor | None = None) -> Tensor:
        terms = [term if term.baseline is None else term.at_baseline(0.0) for term in terms]
        answer = torch.zeros(self.planned.sequence_length - self.prompt_length)
        references: dict[str, Tensor | list[Tensor]] = {}
        for term in terms:
            per_token = term.loss.reference == "token"
            values = [answer] * micro.sequences if per_token else torch.zeros(micro.sequences)
            references |= dict.fromkeys(term.batch_key, values)
        everywhere = any(term.positions == "all" for term in terms)
        rows = len(micro.input_ids if everywhere else micro.rows)  # of each rank
        hidden = any(t.loss.reference == "hidden" for t in terms)
        reference = self._reference(rows) if hidden else None
        counts = {term.name: 1 for term in terms}
        with FlashAttention():
            loss, _, _ = micro_batch_loss(
                self.lm, micro.to(self.lm.device), terms, counts, references, reference, states
            )
        return loss

    def _reference(self, rows: int) -> Any:
        """Stands for ``ReferenceStates``: the reference's head, and hidden states of ``rows``."""
        head, hold = self.lm.head.weight, self.tracker.hold

        def empty_states(source: str, indices: Iterable[int]) -> Tensor:  # (rows of all, D)
            own = head.new_empty(rows, head.shape[1])
            if (vocabulary := self.lm.vocabulary_slice) is not None:
                gathered = gather_rows(own, [rows] * self.ranks, vocabulary.group)
                own = torch.cat(gathered.chunk(len(list(indices))))  # in the order of indices
            return hold(own, REFERENCE)

        arguments = {
            f"ref_{name}": value
            for name, value in self.lm.head_arguments.items()
            if not isinstance(value, Tensor) and name != "vocabulary"
        }
        if self.layer is None:
            arguments["ref_weight"] = hold(torch.empty_like(head), REFERENCE)
        return SimpleNamespace(head_arguments=arguments, hidden=empty_states)

    def backward(self, loss: Tensor) -> None:
        """The backward pass or, with ``step_in_backward``, both."""
        self._count_as(BACKWARD)
        for last in (False, True) if self.planned.step_in_backward else (True,):
            loss.backward(retain_graph=not last)
            if self.sharded is not None:
                self.sharded.end_of_backward()

    def _is_sharded(self, parameter: Tensor) -> bool:
        """Whether FSDP gathers the parameter; embedding and head are slices already."""
        return self.sharded is not None and parameter in self.sharded.of

    def _share(self, parameter: Tensor) -> Tensor:
        """A tensor like this rank's share of the parameter."""
        if not self._is_sharded(parameter):
            return parameter
        return parameter.new_empty(local_shape(parameter, self.ranks))

    def _reduced(self, parameter: Tensor) -> None:
        """Keeps this rank's share of a gradient or, with ``step_in_backward``, applies it."""
        if self.planned.offload_optimizer or parameter in self.gradients:
            return
        share = self.tracker.hold(self._share(parameter), GRADIENTS)
        if self.planned.step_in_backward:
            self.update(parameter)
        else:
            self.gradients[parameter] = share

    def _accumulated(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.tracker.hold(parameter.grad, GRADIENTS)
        if self.planned.step_in_backward and not self._is_sharded(parameter):
            self.update(parameter)
            parameter.grad = None

    def update(self, parameter: Tensor) -> None:
        """Allocates what an update needs: two fp32 copies, nothing with PyTorch's fused AdamW."""
        if self.planned.optimizer != "adamw":
            torch.empty(2, self._share(parameter).numel(), dtype=torch.float32, device="meta")

    def _count_as(self, kind: str) -> None:
        """New tensors count as ``kind`` from now on."""
        self.tracker.kind = kind


def _trained(lm: CausalLM, layer: int | None) -> list[torch.nn.Parameter]:
    """The weights that get a gradient: of a method that stops at a ``layer``, none behind it."""
    behind: set[int] = set()
    if layer is not None:
        behind = {id(p) for m in repeated_layers(lm.decoder)[layer + 1 :] for p in m.parameters()}
        if lm.head.weight is not lm.model.get_input_embeddings().weight:
            behind |= {id(p) for p in lm.head.parameters()}
    return [p for p in lm.model.parameters() if p.requires_grad and id(p) not in behind]
