"""One training step: the losses of a batch, their gradient, new weights.

``take_step`` goes through it from top to bottom: ``accumulate_gradients`` sends micro-batches
through the model, ``micro_batch_loss`` makes the loss of one, and ``update`` changes the weights.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from npo_fast import watch
from npo_fast.data import PackedBatch, Sources, concatenate
from npo_fast.distributed import is_lost_contact
from npo_fast.errors import UserError, first_line
from npo_fast.losses import CEU, KL, RMU, HeldStates, LayerLoss
from npo_fast.methods import Term
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.layers import layer_number
from npo_fast.model.reference_states import ReferenceStates
from npo_fast.ops import linear_sequence_loss, segment_sum
from npo_fast.trainer.order import BatchKey, batch_keys, interleave
from npo_fast.trainer.out_of_memory import (
    is_out_of_memory,
    shortage_of_another,
    smaller_micro_batches,
    tell_of_shortage,
    update_out_of_memory,
)
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.sharpness import sharpness_aware
from npo_fast.trainer.state import TrainState, random_state, set_random_state
from npo_fast.trainer.update import Update

References = Mapping[str, Tensor | list[Tensor]]  # source -> a number, or (n,), a sequence


@dataclass(frozen=True)
class StepResult:
    """What a step measured; where the loss or the norm is not finite, it was not applied."""

    loss: float
    terms: dict[str, float]  # value of each term, before its coefficient
    log_probs: dict[str, float]  # source -> mean log-prob of a sequence
    grad_norm: float  # before clipping


def take_step(
    lm: CausalLM,
    batch: Sources,
    terms: tuple[Term, ...],
    settings: TrainSettings,
    state: TrainState,
    update: Update,
    references: References | None = None,
    reference_cache: ReferenceStates | None = None,
) -> StepResult:
    """One step of the optimizer on ``sum(term.coefficient * term)`` over ``batch``.

    Where memory runs out before weights change, the step begins again in smaller micro-batches,
    without gradients and with the same random numbers, as if it had begun with those. They stay
    small afterwards (``state.micro_batch_tokens``).

    Raises:
        SharedOutOfMemory: one of several processes has no memory; no weight has changed.
        OutOfMemory: smaller micro-batches do not help, or are not possible; no weight has changed.
        PartialUpdateOutOfMemory: the optimizer does not fit, after some weights may have changed.
    """
    random_numbers = random_state(lm.device)
    while True:
        assert state.micro_batch_tokens is not None
        tokens = sys.maxsize if settings.step_in_backward else state.micro_batch_tokens
        try:
            values, log_probs = gradient_of_step(
                lm, batch, terms, tokens, settings, update, references, reference_cache
            )
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                is_lost = lm.world_size > 1 and is_lost_contact(error)
                if is_lost and (shortage := shortage_of_another()) is not None:
                    raise shortage from None
                raise
            reason = first_line(error)
        # outside of the handler, where the error no longer holds the activations
        update.discard()
        set_random_state(random_numbers, lm.device)
        if lm.device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = smaller_micro_batches(lm, batch, terms, settings, state, reason)
        if lm.world_size > 1:
            raise tell_of_shortage(lm, state.step + 1, smaller, reason)
        state.micro_batch_tokens = smaller

    loss = sum(term.coefficient * values[term.name] for term in terms)
    try:
        grad_norm = update.apply(loss)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise update_out_of_memory(state.step + 1, error, update.started) from error
    return StepResult(loss, values, log_probs, grad_norm)


def gradient_of_step(
    lm: CausalLM,
    batch: Sources,
    terms: tuple[Term, ...],
    tokens: int,
    settings: TrainSettings,
    update: Update,
    references: References | None,
    reference_cache: ReferenceStates | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """``accumulate_gradients``, or with ``sharpness_rho`` those of a sharpness-aware step."""

    def accumulate(some: tuple[Term, ...]) -> tuple[dict[str, float], dict[str, float]]:
        return accumulate_gradients(lm, batch, some, tokens, update, references, reference_cache)

    if not settings.sharpness_rho:
        return accumulate(terms)
    return sharpness_aware(
        accumulate, terms, update.optimizer, settings.sharpness_rho, lm.device,
        settings.offload_optimizer,
    )  # fmt: skip


def accumulate_gradients(
    lm: CausalLM,
    batch: Sources,
    terms: tuple[Term, ...],
    micro_batch_tokens: int,
    update: Update,
    references: References | None,
    reference_cache: ReferenceStates | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Hands the loss of each micro-batch to ``update``; their sum is that of the whole batch.

    Returns the value of each term and the mean log-prob of a sequence of each source.
    """
    baselines: set[str] = {term.baseline for term in terms if term.baseline is not None}
    of_baselines = {name: lm.micro_batches(batch[name], micro_batch_tokens) for name in baselines}
    terms = with_baselines(lm, terms, of_baselines, references)
    counts = {term.name: count(term, batch) for term in terms}
    micro_batches = [
        (key, micro)
        for key in batch_keys(terms)
        for micro in lm.micro_batches(interleave(batch, key), micro_batch_tokens, len(key))
    ]
    states: list[Tensor | None] = [None] * len(micro_batches)
    if update.takes_whole_step:  # all through the decoder at once: it frees gradients as they come
        packs = [micro for _, micro in micro_batches]
        whole = lm.states(concatenate(packs), layer_of(lm, terms))
        states = list(whole.split([len(p.input_ids) for p in packs]))

    values = dict.fromkeys(counts, torch.zeros((), device=lm.device))
    sums: dict[BatchKey, Tensor] = {}  # of sequence log-probs, a number a source
    for i, ((key, micro), micro_states) in enumerate(zip(micro_batches, states, strict=True), 1):
        watch.detail(f"micro-batch {i} of {len(micro_batches)}")
        terms_of_key = [term for term in terms if term.batch_key == key]
        loss, micro_values, log_probs = micro_batch_loss(
            lm, micro, terms_of_key, counts, references, reference_cache, micro_states
        )
        update.add(loss)
        for name, value in micro_values.items():
            values[name] = values[name] + value
        if log_probs is None:
            continue
        by_source = log_probs.view(-1, len(key)).sum(dim=0)
        sums[key] = sums[key] + by_source if key in sums else by_source
    mean_log_probs = {
        source: float(log_prob_sum) / len(batch[source])
        for key, by_source in sums.items()
        for source, log_prob_sum in zip(key, by_source, strict=True)
    }
    return {name: float(value) for name, value in values.items()}, mean_log_probs


def micro_batch_loss(
    lm: CausalLM,
    micro: PackedBatch,  # on the device of ``lm``
    terms: Iterable[Term],
    counts: Mapping[str, int | Tensor],
    references: References | None,
    reference_cache: ReferenceStates | None = None,
    states: Tensor | None = None,  # (T, D)
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """A micro-batch's share of the step's loss and of each term, and its sequence log-probs (S,).

    Terms of a layer make no log-probs: the decoder stops there.

    Args:
        terms: those of one batch key, whose sources alternate in the micro-batch.
        counts: what the sum of each term over the whole step is divided by.
        states: those of ``layer_of(lm, terms)``, where the decoder has run already.
    """
    terms = tuple(terms)
    layer = layer_of(lm, terms)
    if states is None:
        states = lm.states(micro, layer)
    if layer is not None:
        return *_layer_losses(lm, micro, terms, counts, reference_cache, states), None
    hidden = lm.answer_rows(states, micro)
    loss = hidden.new_zeros((), dtype=torch.float32)
    values = {}
    sequence_log_probs = None
    for term in terms:
        if isinstance(term.loss, KL):
            assert reference_cache is not None, f"{term.name} needs a reference cache"
            value = term.loss(
                lm.all_states(states, micro) if term.positions == "all" else hidden,
                lm.head_arguments,
                reference_cache.hidden(term.source, micro.indices),
                reference_cache.head_arguments,
                labels=micro.labels if term.loss.demotion else None,
            )
        else:
            assert not isinstance(term.loss, LayerLoss)
            value, sequence_log_probs = linear_sequence_loss(
                hidden,
                labels=micro.labels,
                cu_seqlens=micro.answer_cu_seqlens,
                loss=term.loss,
                ref_log_probs=_reference_values(term, micro, references),
                reduction="sum",
                **lm.head_arguments,
            )
        if isinstance(term.loss, CEU):  # the cross-entropy that its gradient is of
            offsets = micro.answer_cu_seqlens
            value = value + term.loss.target_entropy(lm.linear_head, hidden, micro.labels, offsets)
        value = value / counts[term.name]
        values[term.name] = value.detach()
        loss = loss + term.coefficient * value
    if sequence_log_probs is None:  # every term is a KL, which makes none on its way
        with torch.no_grad():
            log_probs = lm.log_probs_of(hidden, micro.labels)
            sequence_log_probs = segment_sum(log_probs, micro.answer_cu_seqlens)
    return loss, values, sequence_log_probs


def layer_of(lm: CausalLM, terms: Iterable[Term]) -> int | None:
    """The decoder layer where terms that share a pass through the model stop; None runs all."""
    layers = {
        layer_number(lm.decoder, term.loss.layer) if isinstance(term.loss, LayerLoss) else None
        for term in terms
    }
    if len(layers) > 1:
        raise UserError("terms that share a pass must all be of one decoder layer, or none of any")
    return layers.pop()


def _layer_losses(
    lm: CausalLM,
    micro: PackedBatch,
    terms: Iterable[Term],
    counts: Mapping[str, int | Tensor],
    reference_cache: ReferenceStates | None,
    states: Tensor,  # (T, D)
) -> tuple[Tensor, dict[str, Tensor]]:
    """``micro_batch_loss`` of terms of the layer that ``states`` come from.

    Each process has the loss of its own sequences; the values are those of all.
    """
    loss = states.new_zeros((), dtype=torch.float32)
    values = {}
    for term in terms:
        assert isinstance(term.loss, LayerLoss)
        everywhere = term.positions == "all"
        places, offsets = micro.tokens(everywhere)
        if isinstance(term.loss, RMU):
            target = term.loss.target(states.shape[-1]).to(states.device)
        else:
            assert isinstance(term.loss, HeldStates)
            assert reference_cache is not None, f"{term.name} needs a reference cache"
            target = reference_cache.hidden(term.source, micro.indices)
            before = sum((micro.tokens_by_rank if everywhere else micro.rows_by_rank)[: lm.rank])
            target = target[before : before + int(offsets[-1])]
        value = term.loss(states[places], offsets, target).sum() / counts[term.name]
        values[term.name] = lm.all_reduce_sum(value.detach().clone())
        loss = loss + term.coefficient * value
    return loss, values


def _reference_values(
    term: Term, micro: PackedBatch, references: References | None
) -> Tensor | None:  # (S,) or (N,), as the loss wants them
    if term.loss.reference is None:
        return None
    assert references is not None, f"{term.name} needs reference log-probs"
    values = [references[name][i] for name, i in zip(cycle(term.batch_key), micro.indices)]
    join = torch.stack if term.loss.reference == "sequence" else torch.cat
    return join(values).to(micro.labels.device)


@torch.no_grad()
def with_baselines(
    lm: CausalLM,
    terms: Iterable[Term],
    micro_batches: Mapping[str, Iterable[PackedBatch]],  # those of the step, by source
    references: References | None,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,  # over processes with other sequences
) -> tuple[Term, ...]:
    """The terms with their baselines: the mean log-ratio of the baseline source in this step."""
    with_baseline = []
    for term in terms:
        if term.baseline is not None:
            assert references is not None, f"{term.name} needs reference log-probs"
            sums = torch.zeros(2)  # of log-ratios, of sequences
            for micro in micro_batches[term.baseline]:
                log_probs = segment_sum(lm.log_probs(micro), micro.answer_cu_seqlens).cpu()
                reference = torch.stack([references[term.baseline][i] for i in micro.indices])
                sums += torch.stack([(log_probs - reference).sum(), torch.tensor(len(reference))])
            total, sequences = reduce(sums).tolist()
            term = term.at_baseline(total / sequences)
        with_baseline.append(term)
    return tuple(with_baseline)


def count(term: Term, batch: Sources) -> int:
    """What the term's sum over the step is divided by: sequences, tokens, or 1."""
    examples = [example for name in term.over or (term.source,) for example in batch.get(name, ())]
    everywhere = term.positions == "all"
    tokens = sum(
        len(e.input_ids) if everywhere else max(0, e.answer_length - term.skip_first)
        for e in examples
    )
    return {"mean": len(examples), "token_mean": max(1, tokens), "sum": 1}[term.reduction]
