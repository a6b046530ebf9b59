"""A causal language model as what the loss needs: hidden states of packed tokens, and a head."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from npo_fast.data import PackedBatch
from npo_fast.data.packing import one_by_one
from npo_fast.errors import UserError
from npo_fast.kernels.transform import HeadTransform
from npo_fast.model.attention import NAME as PACKED_ATTENTION
from npo_fast.model.choice import Demands, attentions, demands_of, machine_of, varlen_obstacle
from npo_fast.model.probe import run_probe
from npo_fast.model.varlen import NAME as VARLEN_ATTENTION
from npo_fast.ops import linear_log_probs
from npo_fast.ops.head import Head
from npo_fast.ops.vocab_parallel import VocabularySlice, gather_rows, local_head

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # RecurrentGemma has its own name


class CausalLM:
    """Decoder and head of a Hugging Face model.

    Built with a probe: a handful of tokens through ``model(...).logits`` and through our decoder
    and head must give the same log-probs, else the head is one we do not know and a ``UserError``
    says so. A pack must give the same log-probs as one sequence at a time; a model that cannot
    keep sequences of a pack apart runs them one at a time, with a warning.
    """

    def __init__(self, model: Any, attention: str = "auto", probe: bool = True) -> None:
        self.model = model
        self.decoder = _decoder(model)
        self.head = model.get_output_embeddings()
        if self.head is None or getattr(self.head, "weight", None) is None:
            raise UserError(f"{type(model).__name__} has no linear LM head (get_output_embeddings)")
        if hasattr(self.head, "base_layer"):
            raise UserError(
                "the LM head carries an adapter (LoRA), which the fused loss does not know: merge "
                "it into the model (peft's merge_and_unload), or leave the head out of its targets"
            )
        text_config = model.config.get_text_config()
        self.transform = _transform(text_config)
        self.wrapper: Any = None
        self.vocabulary_slice: VocabularySlice | None = None  # where ranks divide the model
        self.native_attention = _native_attention(model)
        self.packs = True
        self.unfit: set[str] = set()  # attentions that "auto" does not take again
        self.choose_attention(attention)
        if probe:
            run_probe(self, any_attention=attention == "auto")

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def name(self) -> str:
        """The class of the model, under an adapter too."""
        return type(self.model.get_base_model() if self.adapted else self.model).__name__

    @property
    def adapted(self) -> bool:
        """A peft adapter lies over the weights."""
        return hasattr(self.model, "peft_config")

    @property
    def quantized(self) -> bool:
        return bool(getattr(self.model, "is_quantized", False))

    @property
    def vocabulary(self) -> int:
        """Token ids that the model can read and predict."""
        embedding = self.model.get_input_embeddings().weight
        return min(self.head.weight.shape[0], embedding.shape[0])

    @property
    def head_arguments(self) -> dict[str, Any]:
        """``weight``, ``bias`` and the fields of ``transform`` as the operators take them.

        Where ranks divide the model: of this rank's slice, and ``vocabulary`` says which it is.
        """
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        sliced = {}
        if self.vocabulary_slice is not None:
            sliced = {"vocabulary": self.vocabulary_slice}
            weight, bias = weight.to_local(), None if bias is None else bias.to_local()
        return {
            "weight": weight,
            "bias": bias,
            **self.transform._asdict(),
            **sliced,
        }

    @property
    def linear_head(self) -> Head:
        """The same as the chunk-wise code below the operators takes it."""
        arguments = self.head_arguments
        weight, bias = arguments["weight"], arguments["bias"]
        return local_head(weight, bias, self.transform, self.vocabulary_slice)

    @property
    def world_size(self) -> int:
        """Processes that divide the model; 1 where it is whole, under DDP too."""
        return 1 if self.vocabulary_slice is None else self.vocabulary_slice.world_size

    @property
    def rank(self) -> int:
        return 0 if self.vocabulary_slice is None else self.vocabulary_slice.rank

    def on_all_ranks(self, rows: Tensor, packs: list[PackedBatch]) -> Tensor:  # (n, D) -> (N, D)
        """From the answer rows of this rank's pack, one of ``packs``, those of all of them."""
        if self.vocabulary_slice is None:
            return rows
        counts = [len(pack.rows) for pack in packs]
        return gather_rows(rows, counts, self.vocabulary_slice.group)

    def states(self, batch: PackedBatch) -> Tensor:  # (T, D)
        """Last hidden states of every token."""
        if not self.packs:
            return torch.cat([self._last_hidden(one) for one in one_by_one(batch)])
        return self._last_hidden(batch)

    def hidden(self, batch: PackedBatch) -> Tensor:  # (N, D)
        """Last hidden states of the rows that predict an answer token."""
        return self.states(batch)[batch.rows]

    def log_probs(self, batch: PackedBatch) -> Tensor:  # (N,)
        """Log-probability of every answer token."""
        return self.log_probs_of(self.hidden(batch), batch.labels)

    def log_probs_of_packs(self, packs: list[PackedBatch]) -> Tensor:  # (N,)
        """Those of the answer tokens of all packs, one for each rank; without a gradient."""
        own = self.hidden(packs[self.rank].to(self.device))
        labels = torch.cat([one.labels for one in packs]).to(self.device)
        return self.log_probs_of(self.on_all_ranks(own, packs), labels)

    def log_probs_of(self, hidden: Tensor, labels: Tensor) -> Tensor:  # (N, D), (N,) -> (N,)
        """Where ranks divide the model: of rows that all of them have, without a gradient."""
        if self.vocabulary_slice is not None:
            return self.linear_head.log_probs(hidden.detach(), labels)
        return linear_log_probs(hidden, labels=labels, **self.head_arguments)

    def recompute_activations(self) -> None:
        """Gradient checkpointing: a layer keeps its input alone, and its backward runs it again.

        Raises:
            UserError: the model does not know how.
        """
        # transformers gave it a new name in 5.x
        new = getattr(self.model, "activation_checkpointing_enable", None)
        enable = new or self.model.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"{self.name} has no gradient checkpointing: leave it out") from error

    @contextmanager
    def within(self, wrapper: Any) -> Iterator[None]:
        """Hidden states come through ``wrapper``'s forward inside: DDP learns of the pass so."""
        self.wrapper = None if wrapper is self.model else wrapper
        try:
            yield
        finally:
            self.wrapper = None

    @contextmanager
    def generating(self) -> Iterator[Any]:
        """The model with its own attention and in evaluation mode: what ``generate`` expects."""
        was_training = self.model.training
        attention = self.model.config._attn_implementation
        self.model.eval()
        self._set_attention(self.native_attention)
        try:
            yield self.model
        finally:
            self._set_attention(attention)
            self.model.train(was_training)

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Packs go through the model inside; afterwards it has its own attention again."""
        self._set_attention(self.attention)
        try:
            yield
        finally:
            self._set_attention(self.native_attention)

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, pad_id: int, eos_id: int
    ) -> list[list[int]]:
        """Greedy continuations of several prompts at once, up to and without ``eos_id``."""
        width = max(len(p) for p in prompts)
        flipped = [torch.tensor(p[::-1]) for p in prompts]
        ids = pad_sequence(flipped, batch_first=True, padding_value=pad_id).flip(1)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with self.generating() as model:
            out = model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad_id,
                eos_token_id=eos_id,
            )
        continuations = out[:, width:].tolist()
        return [row[: row.index(eos_id)] if eos_id in row else row for row in continuations]

    def _last_hidden(self, batch: PackedBatch) -> Tensor:  # (T, D)
        if self.attention == PACKED_ATTENTION:
            boundaries: dict[str, Any] = {"sequence_lengths": batch.lengths} if self.packs else {}
        elif self.attention == VARLEN_ATTENTION:
            boundaries = _bounds(batch) if self.packs else {}
        elif "flash" in self.attention:  # of any version, or a kernel of the hub
            boundaries = _bounds(batch)
        else:  # transformers builds the mask of a pack from position ids that restart
            boundaries = {}
        if self.packs:
            boundaries["position_ids"] = batch.position_ids[None]
        inputs = {"input_ids": batch.input_ids[None], "use_cache": False, **boundaries}
        if self.wrapper is None:
            return self.decoder(**inputs).last_hidden_state[0]
        caught: list[Tensor] = []
        hook = self.decoder.register_forward_hook(
            lambda _module, _inputs, out: caught.append(out.last_hidden_state)
        )
        try:  # one row of logits, so that the head too is part of what the wrapper returns
            self.wrapper(**inputs, logits_to_keep=1)
        finally:
            hook.remove()
        return caught[0][0]

    def choose_attention(self, attention: str) -> None:
        """By its transformers name, or "auto" as ``load_model`` has it.

        Raises:
            UserError: the model or the device cannot take it.
        """
        if attention == "auto":
            attention = self._best_attention()
        elif attention == VARLEN_ATTENTION:
            why = varlen_obstacle(machine_of(self.device), self.dtype, self._demands())
            if why is not None:
                raise UserError(f"attention {attention} cannot run here: {why}")
        if not self._set_attention(attention):
            self.packs = False
            warnings.warn(
                f"{type(self.model).__name__} does not take attention from outside: "
                "sequences run one at a time",
                stacklevel=3,
            )
            attention = self.native_attention
        self.attention = attention

    def _best_attention(self) -> str:
        if PACKED_ATTENTION in self.unfit:  # the one that asks least of a model
            return self.native_attention
        packages = self.model._supports_flash_attn
        serving = attentions(machine_of(self.device), self.dtype, self._demands(), packages)
        return next(attention for attention in serving if attention not in self.unfit)

    def _demands(self) -> Demands:
        return demands_of(self.decoder, self.model.config.get_text_config())

    def _set_attention(self, attention: str) -> bool:
        if self.model.config._attn_implementation != attention:
            try:
                self.model.set_attn_implementation(attention)
            except (ValueError, ImportError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"{self.name} cannot take attention {attention}: {reason}"
                ) from error
        return self.model.config._attn_implementation == attention


def _bounds(batch: PackedBatch) -> dict[str, Any]:
    """Where sequences end, by the names that transformers has for it."""
    longest = max(batch.lengths)
    return {
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _decoder(model: Any) -> Any:
    """What makes the hidden states; ``get_decoder`` of some returns the whole model."""
    decoder = model.get_decoder()
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    if decoder is whole:
        decoder = getattr(whole, "model", None)
    if decoder is None:
        raise UserError(f"{type(whole).__name__} has no decoder that npo_fast could find")
    return decoder


def _transform(text_config: Any) -> HeadTransform:
    """Returns what the model does to its logits, by the names that configs have for it."""
    softcap = next((v for n in SOFTCAPS if (v := getattr(text_config, n, None)) is not None), None)
    logit_scale = float(getattr(text_config, "logit_scale", None) or 1.0)
    logit_scale /= float(getattr(text_config, "logits_scaling", None) or 1.0)
    return HeadTransform(softcap, logit_scale)


def _native_attention(model: Any) -> str:
    """What transformers chose for it; a config shared with another ``CausalLM`` carries ours."""
    chosen = model.config._attn_implementation or "eager"
    if chosen not in (PACKED_ATTENTION, VARLEN_ATTENTION):
        return chosen
    return "sdpa" if model._supports_sdpa else "eager"
