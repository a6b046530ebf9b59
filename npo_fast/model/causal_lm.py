"""A causal language model as what the loss needs: hidden states of packed tokens, and a head."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from npo_fast.data import PackedBatch, TokenizedExample, micro_batches
from npo_fast.data.packing import one_by_one
from npo_fast.distributed import all_reduce_max, local_of
from npo_fast.errors import UserError
from npo_fast.model.attention import NAME as PACKED_ATTENTION
from npo_fast.model.attention import class_name, set_attention, without_masks
from npo_fast.model.choice import attentions, demands_of, machine_of, varlen_obstacle
from npo_fast.model.head_transform import measure_transform
from npo_fast.model.layers import layer_output
from npo_fast.model.probe import run_probe, runs
from npo_fast.model.varlen import NAME as VARLEN_ATTENTION
from npo_fast.ops.head import Head
from npo_fast.ops.linear_log_probs import linear_log_probs
from npo_fast.ops.vocab_parallel import VocabularySlice, gather_rows, local_head


class CausalLM:
    """Decoder and head of a Hugging Face model.

    Where several processes share the model (``npo_fast.model.sharding``), each runs its own
    sequences through the decoder and sees the answer rows of all of them.

    Args:
        model: a Hugging Face causal language model.
        attention: as in ``load_model``.
        probe: compares a handful of tokens through ``model(...).logits`` with our decoder and
            head, and a pack with its sequences alone (``npo_fast.model.probe``). What the model
            does to its raw logits is measured in any case (``npo_fast.model.head_transform``).

    Raises:
        UserError: a head or a decoder that is not understood, or an attention that cannot run.
    """

    def __init__(self, model: Any, attention: str = "auto", probe: bool = True) -> None:
        if not hasattr(model, "get_output_embeddings"):
            inner = " pass its .module" if hasattr(model, "module") else ""
            raise UserError(
                f"a causal language model of transformers is wanted, got {type(model).__name__}:"
                f"{inner or ' load it with AutoModelForCausalLM'}"
            )
        self.model = model
        self.head = model.get_output_embeddings()
        if hasattr(self.head, "modules_to_save"):  # peft's copy, which trains beside an adapter
            self.head = self.head.modules_to_save[self.head.active_adapters[0]]
        if self.head is None or getattr(self.head, "weight", None) is None:
            raise UserError(f"{type(model).__name__} has no linear LM head (get_output_embeddings)")
        if hasattr(self.head, "base_layer"):
            raise UserError(
                "the LM head carries an adapter (LoRA), which the fused loss does not know: merge "
                "it into the model (peft's merge_and_unload), or leave the head out of its targets"
            )
        self.decoder = decoder_of(model, self.head)
        self.wrapper: Any = None  # the module whose forward is called, where not the decoder's
        # where processes share the model
        self.vocabulary_slice: VocabularySlice | None = getattr(self.head, "vocabulary", None)
        self.native_attention = _native_attention(model)
        self.packs = True  # else sequences run one at a time
        self.saved_dtype: torch.dtype | None = None  # of the files it came from, where known
        self.max_shard_bytes: int | None = None  # of those files, where they are several
        self.unfit: set[str] = set()  # attentions that "auto" does not take again
        with runs(self), self.generating():
            self.transform = measure_transform(self)
        self.choose_attention(attention)
        if probe:
            run_probe(self, any_attention=attention == "auto")

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the head."""
        return self.head.weight.dtype

    @property
    def name(self) -> str:
        """The class of the model, under an adapter too."""
        return class_name(self.model)

    @property
    def adapted(self) -> bool:
        """Whether a peft adapter lies over the weights."""
        return hasattr(self.model, "get_base_model")

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantised, as by bitsandbytes."""
        return bool(getattr(self.model, "is_quantized", False))

    @property
    def vocabulary(self) -> int:
        """Token ids that the model can read and predict."""
        embedding = self.model.get_input_embeddings().weight
        return min(self.head.weight.shape[0], embedding.shape[0])

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sequence, of a model with learned positions (GPT-2); else None."""
        config = self.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        words = self.model.get_input_embeddings()
        embeddings = (m for m in self.model.modules() if isinstance(m, nn.Embedding))
        # up to two rows are for padding
        sizes = {m.num_embeddings - (longest or 0) for m in embeddings if m is not words}
        return int(longest) if longest and sizes & {0, 1, 2} else None

    @property
    def linear_head(self) -> Head:
        """The head, or this process's slice of it, for code that makes logits a chunk at a time."""
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        if self.vocabulary_slice is not None:
            weight, bias = weight.to_local(), None if bias is None else bias.to_local()
        return local_head(weight, bias, self.transform, self.vocabulary_slice)

    @property
    def head_arguments(self) -> dict[str, Any]:
        """``linear_head`` as the operators take it; of a slice, ``vocabulary`` says which."""
        head = self.linear_head
        arguments = {"weight": head.weight, "bias": head.bias, **head.transform._asdict()}
        if self.vocabulary_slice is not None:
            arguments["vocabulary"] = self.vocabulary_slice
        return arguments

    @property
    def world_size(self) -> int:
        """Processes that share the model (FSDP); 1 where each has all of it, under DDP too."""
        return 1 if self.vocabulary_slice is None else self.vocabulary_slice.world_size

    @property
    def rank(self) -> int:
        """Which of ``world_size`` processes this is."""
        return 0 if self.vocabulary_slice is None else self.vocabulary_slice.rank

    def micro_batches(
        self, sequences: Iterable[TokenizedExample], max_tokens: int, group: int = 1
    ) -> list[PackedBatch]:
        """What goes through the model at a time, on its device; see ``npo_fast.data``."""
        batches = micro_batches(sequences, max_tokens, group, self.world_size, self.rank)
        return [batch.to(self.device) for batch in batches]

    def states(self, batch: PackedBatch, layer: int | None = None) -> Tensor:  # (T, D)
        """Last hidden states of every token; or what a decoder ``layer`` hands on: none later runs.

        The states of a layer have its own dtype.
        """
        if self.packs:
            return self._states(batch, layer)
        singles = list(one_by_one(batch))
        # processes that share the model make as many passes, forward and backward
        more = self.all_reduce_max(len(singles)) - len(singles)
        states = [self._states(single, layer) for single in singles + singles[:1] * more]
        return torch.cat(states)[: len(batch.input_ids)]

    def answer_rows(self, states: Tensor, batch: PackedBatch) -> Tensor:  # (T, D) -> (N, D)
        """The rows of ``states`` that predict an answer token, of all processes that share it."""
        rows = states[batch.rows]
        if self.vocabulary_slice is None or not batch.rows_by_rank:
            return rows
        return gather_rows(rows, batch.rows_by_rank, self.vocabulary_slice.group)

    def all_states(self, states: Tensor, batch: PackedBatch) -> Tensor:  # (T, D) -> (T', D)
        """The states of every token of a batch, of all processes that share it."""
        if self.vocabulary_slice is None or not batch.tokens_by_rank:
            return states
        places, _ = batch.tokens(everywhere=True)
        return gather_rows(states[places], batch.tokens_by_rank, self.vocabulary_slice.group)

    def all_reduce_max(self, value: int) -> int:
        """The largest value of the processes that share the model."""
        if self.vocabulary_slice is None:
            return value
        return all_reduce_max(value, self.device, self.vocabulary_slice.group)

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over the processes that share the model, in place."""
        if self.vocabulary_slice is not None:
            dist.all_reduce(value, group=self.vocabulary_slice.group)
        return value

    def hidden(self, batch: PackedBatch) -> Tensor:  # (N, D)
        """Last hidden states of the rows that predict an answer token."""
        return self.answer_rows(self.states(batch), batch)

    def log_probs(self, batch: PackedBatch) -> Tensor:  # (N,)
        """Log-probability of every answer token."""
        return self.log_probs_of(self.hidden(batch), batch.labels)

    def log_probs_of(self, hidden: Tensor, labels: Tensor) -> Tensor:  # (N, D), (N,) -> (N,)
        """Log-probability of ``labels``; without a gradient where processes share the model."""
        if self.vocabulary_slice is not None:
            with torch.no_grad():
                return self.linear_head.log_probs(hidden, labels)
        return linear_log_probs(hidden, labels=labels, **self.head_arguments)

    def recompute_activations(self, **arguments: Any) -> None:
        """Gradient checkpointing: a layer keeps its input alone, and its backward runs it again.

        ``arguments`` are those of ``torch.utils.checkpoint``.
        """
        # this name is new in transformers 5
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        enable = enable or self.model.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False, **arguments})
        except ValueError as error:
            raise UserError(f"{self.name} has no gradient checkpointing: leave it out") from error

    @property
    def recomputes_activations(self) -> bool:
        """Whether there is gradient checkpointing."""
        model: Any = self.model
        names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # new, old
        return bool(next(getattr(model, name) for name in names if hasattr(model, name)))

    def keep_activations(self) -> None:
        """Ends ``recompute_activations``."""
        disable = getattr(self.model, "activation_checkpointing_disable", None)
        (disable or self.model.gradient_checkpointing_disable)()

    @torch.no_grad()
    def round_weights(self, dtype: torch.dtype) -> None:
        """Rounds weights of the head's dtype to numbers that ``dtype`` has, in place."""
        for parameter in self.model.parameters():
            if parameter.dtype == self.dtype:
                local = local_of(parameter)
                local.copy_(local.to(dtype))

    @contextmanager
    def within(self, wrapper: Any) -> Iterator[None]:
        """Inside, hidden states come through ``wrapper``'s forward, as DDP needs it."""
        self.wrapper = None if wrapper is self.model else wrapper
        try:
            yield
        finally:
            self.wrapper = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def generating(self) -> Iterator[Any]:
        """The model with its own attention and in evaluation mode: what ``generate`` expects."""
        before = self.model.config._attn_implementation
        with self.evaluating(), self._with_attention(self.native_attention, before):
            yield self.model

    def packing(self) -> AbstractContextManager[None]:
        """Inside, the model has the attention for packs; afterwards its own again."""
        return self._with_attention(self.attention, self.native_attention)

    @contextmanager
    def _with_attention(self, inside: str, afterwards: str) -> Iterator[None]:
        set_attention(self.model, inside)
        try:
            yield
        finally:
            set_attention(self.model, afterwards)

    def choose_attention(self, attention: str) -> None:
        """Sets the attention by its transformers name, or "auto" as ``load_model`` has it."""
        if attention == "auto" and PACKED_ATTENTION in self.unfit:  # it asks least of a model
            attention = self.native_attention
        elif attention in ("auto", VARLEN_ATTENTION):
            machine = machine_of(self.device)
            demands = demands_of(self.decoder, self.model.config.get_text_config())
            if attention == "auto":
                packages = self.model._supports_flash_attn
                serving = attentions(machine, self.dtype, demands, packages)
                attention = next(name for name in serving if name not in self.unfit)
            elif why := varlen_obstacle(machine, self.dtype, demands):
                raise UserError(f"attention {attention} cannot run here: {why}")
        if not set_attention(self.model, attention):
            self.packs = False
            warnings.warn(
                f"{type(self.model).__name__} does not take attention from outside: "
                "sequences run one at a time",
                stacklevel=3,
            )
            attention = self.native_attention
        self.attention = attention

    def _states(self, batch: PackedBatch, layer: int | None) -> Tensor:  # (T, D)
        inputs = {"input_ids": batch.input_ids[None], "use_cache": False}
        inputs |= _boundary_arguments(self.attention, batch, self.packs)
        if layer is not None:
            with without_masks():
                return layer_output(self.decoder, layer, lambda: self.decoder(**inputs))[0]
        if self.wrapper is None:
            with without_masks():
                return self.decoder(**inputs).last_hidden_state[0].to(self.dtype)
        caught: list[Any] = []
        catch = self.decoder.register_forward_hook(lambda _module, _inputs, out: caught.append(out))
        with catch, without_masks():
            # one row of logits, so that the head too is part of what the wrapper returns
            self.wrapper(**inputs, logits_to_keep=1)
        return caught[0].last_hidden_state[0].to(self.dtype)


def _native_attention(model: Any) -> str:
    """The attention that transformers chose for the model."""
    chosen = model.config._attn_implementation or "eager"
    if chosen in (PACKED_ATTENTION, VARLEN_ATTENTION):  # by another CausalLM of the same config
        return "sdpa" if model._supports_sdpa else "eager"
    return chosen


def _boundary_arguments(attention: str, batch: PackedBatch, packs: bool) -> dict[str, Any]:
    """What tells ``attention`` where sequences end: arguments of the decoder.

    Of a model that does not take ``packs``, the batch is a single sequence.
    """
    arguments: dict[str, Any] = {}
    if packs:  # for attentions not named here, transformers makes the mask from the position ids
        arguments["position_ids"] = batch.position_ids[None]
    if packs and attention == PACKED_ATTENTION:
        arguments["sequence_lengths"] = batch.lengths
    # "flash": of any version, or a kernel of the hub
    if "flash" in attention or (packs and attention == VARLEN_ATTENTION):
        longest = max(batch.lengths)
        arguments |= {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
        arguments |= {"max_length_q": longest, "max_length_k": longest}
    return arguments


def decoder_of(model: Any, head: Any) -> Any:
    """What makes the hidden states; ``get_decoder`` of some returns the model or its head."""
    decoder = model.get_decoder()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if decoder is base or decoder is head:
        decoder = getattr(base, "model", None)
    if decoder is None:
        raise UserError(f"{type(base).__name__} has no decoder that npo_fast could find")
    return decoder
