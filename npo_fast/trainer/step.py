"""One step of training: from a batch to the gradient of all its terms."""

import sys
from collections.abc import Iterable, Mapping
from itertools import cycle

import torch
from torch import Tensor

from npo_fast.data import PackedBatch, TokenizedExample, concatenate, micro_batches
from npo_fast.errors import OutOfMemory
from npo_fast.losses import KL
from npo_fast.methods import Term
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.reference_states import ReferenceStates
from npo_fast.ops import SequenceLoss, linear_log_probs, linear_sequence_loss, segment_sum
from npo_fast.trainer.order import interleave
from npo_fast.trainer.out_of_memory import halved, is_out_of_memory
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.state import TrainState, random_state, set_random_state
from npo_fast.trainer.update import Update

Sources = Mapping[str, list[TokenizedExample]]
BatchKey = tuple[str, ...]  # sources whose sequences take turns in a micro-batch
References = Mapping[str, Tensor | list[Tensor]]  # source -> a number, or (n,), a sequence


def whole_gradient(
    lm: CausalLM,
    batch: Sources,
    terms: tuple[Term, ...],
    settings: TrainSettings,
    state: TrainState,
    update: Update,
    references: References | None,
    reference_cache: ReferenceStates | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Hands the losses of one step to ``update``, in smaller micro-batches where memory runs out.

    A second try begins with no gradient and with the random numbers of the first: it makes the
    step that smaller micro-batches would have made from the start. They stay small afterwards.

    Returns the value of each term and the mean log-prob of a sequence of each source.
    """
    while True:
        assert state.micro_batch_tokens is not None
        together = settings.step_in_backward
        tokens = sys.maxsize if together else state.micro_batch_tokens
        random = random_state(lm.device)
        try:
            return _accumulate(
                lm, batch, terms, tokens, together, update, references, reference_cache
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            if lm.world_size > 1:
                raise OutOfMemory(
                    f"step {state.step + 1}: out of memory ({reason}), and several processes "
                    "cannot make the step again alone; lower --micro-batch-tokens or add "
                    "--gradient-checkpointing"
                ) from error
        # here, where the error has let go of its frames and they of their activations
        lm.model.zero_grad(set_to_none=True)
        set_random_state(random, lm.device)
        if lm.device.type == "cuda":
            torch.cuda.empty_cache()
        if together:
            raise OutOfMemory(
                f"step {state.step + 1}: out of memory ({reason}), and --step-in-backward takes a "
                "whole step at once; add --gradient-checkpointing or lower --batch-size"
            )
        units = [
            sum(len(batch[name][i].input_ids) for name in batch_key)
            for batch_key in batch_keys(terms)
            for i in range(len(batch[batch_key[0]]))
        ]
        state.micro_batch_tokens = halved(state.micro_batch_tokens, units, state.step + 1, reason)


def _accumulate(
    lm: CausalLM,
    batch: Sources,
    terms: tuple[Term, ...],
    micro_batch_tokens: int,
    together: bool,
    update: Update,
    references: References | None,
    reference_cache: ReferenceStates | None,
) -> tuple[dict[str, float], dict[str, float]]:
    baselines: set[str] = {term.baseline for term in terms if term.baseline is not None}
    packs = {
        n: micro_batches(batch[n], micro_batch_tokens, world_size=lm.world_size) for n in baselines
    }
    terms = with_baselines(lm, terms, packs, references)
    counts = {term.name: count(term, batch) for term in terms}
    values = dict.fromkeys(counts, torch.zeros((), device=lm.device))
    sums: dict[BatchKey, Tensor] = {}
    for passed in _passes(batch, terms, micro_batch_tokens, together, lm.world_size):
        loss, found, log_prob_sums = _forward(
            lm, passed, terms, counts, references, reference_cache
        )
        update.add(loss)
        for name, value in found.items():
            values[name] = values[name] + value
        for batch_key, value in log_prob_sums.items():
            sums[batch_key] = sums[batch_key] + value if batch_key in sums else value
    log_probs = {
        source: float(value) / len(batch[source])
        for batch_key, of_each in sums.items()
        for source, value in zip(batch_key, of_each, strict=True)
    }
    return {name: float(value) for name, value in values.items()}, log_probs


def batch_keys(terms: Iterable[Term]) -> list[BatchKey]:
    return list(dict.fromkeys(term.batch_key for term in terms))


def _passes(
    batch: Sources, terms: Iterable[Term], micro_batch_tokens: int, together: bool, world_size: int
) -> list[list[tuple[BatchKey, list[PackedBatch]]]]:
    """What goes through the model at a time: micro-batches of one stream, or all ``together``."""
    found: list[tuple[BatchKey, list[PackedBatch]]] = []
    for batch_key in batch_keys(terms):
        sequences = interleave(batch, batch_key)
        for packs in micro_batches(sequences, micro_batch_tokens, len(batch_key), world_size):
            found.append((batch_key, packs))
    return [found] if together else [[one] for one in found]


def _forward(
    lm: CausalLM,
    passed: list[tuple[BatchKey, list[PackedBatch]]],  # a pack for each rank
    terms: Iterable[Term],
    counts: Mapping[str, int],
    references: References | None,
    reference_cache: ReferenceStates | None,
) -> tuple[Tensor, dict[str, Tensor], dict[BatchKey, Tensor]]:
    """Loss and terms of one pass through the model, and the summed log-probs of each source."""
    own_packs = [packs[lm.rank].to(lm.device) for _, packs in passed]
    parts = lm.states(concatenate(own_packs)).split([len(one.input_ids) for one in own_packs])
    loss = torch.zeros((), device=lm.device)
    values: dict[str, Tensor] = {}
    sums: dict[BatchKey, Tensor] = {}
    for (batch_key, packs), one, states in zip(passed, own_packs, parts, strict=True):
        own = [term for term in terms if term.batch_key == batch_key]
        hidden = lm.on_all_ranks(states[one.rows], packs)
        value, found, log_probs = micro_step(
            lm, concatenate(packs), own, counts, references, reference_cache, states, hidden
        )
        loss = loss + value
        values |= found
        sums[batch_key] = log_probs.view(-1, len(batch_key)).sum(dim=0)
    return loss, values, sums


def micro_step(
    lm: CausalLM,
    micro: PackedBatch,
    terms: Iterable[Term],
    counts: Mapping[str, int | Tensor],
    references: References | None,
    reference_cache: ReferenceStates | None = None,
    states: Tensor | None = None,  # (T, D)
    hidden: Tensor | None = None,  # (N, D)
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """This micro-batch's share of the step's loss, of each term, and its sequence log-probs.

    The terms are those of one stream, whose sources take turns in the micro-batch; ``states`` are
    the model's, and ``hidden`` those of the answer rows, where they are known.
    """
    micro = micro.to(lm.device)
    if states is None:
        states = lm.states(micro)
    if hidden is None:
        hidden = states[micro.rows]
    loss = hidden.new_zeros((), dtype=torch.float32)
    values = {}
    sequence_log_probs = None
    for term in terms:
        if isinstance(term.loss, KL):
            assert reference_cache is not None, f"{term.name} needs a reference cache"
            value = term.loss(
                states if term.positions == "all" else hidden,
                lm.head_arguments,
                reference_cache.hidden(term.source, micro.indices),
                reference_cache.head_arguments,
                labels=micro.labels if term.loss.demotion else None,
            )
        else:
            value, sequence_log_probs = linear_sequence_loss(
                hidden,
                labels=micro.labels,
                cu_seqlens=micro.answer_cu_seqlens,
                loss=term.loss,
                ref_log_probs=_reference(term.loss, term, micro, references),
                reduction="sum",
                **lm.head_arguments,
            )
        value = value / counts[term.name]
        values[term.name] = value.detach()
        loss = loss + term.coefficient * value
    if sequence_log_probs is None:  # every term is a KL, which makes none on its way
        with torch.no_grad():
            log_probs = linear_log_probs(hidden, labels=micro.labels, **lm.head_arguments)
            sequence_log_probs = segment_sum(log_probs, micro.answer_cu_seqlens)
    return loss, values, sequence_log_probs


def _reference(
    loss: SequenceLoss, term: Term, micro: PackedBatch, references: References | None
) -> Tensor | None:  # (s,) or (n,)
    if loss.reference is None:
        return None
    assert references is not None, f"{term.name} needs reference log-probs"
    of_each = [references[name][i] for name, i in zip(cycle(term.batch_key), micro.indices)]
    put = torch.stack if loss.reference == "sequence" else torch.cat
    return put(of_each).to(micro.labels.device)


@torch.no_grad()
def with_baselines(
    lm: CausalLM,
    terms: Iterable[Term],
    packs: Mapping[str, Iterable[list[PackedBatch]]],  # source -> ``micro_batches`` of the step
    references: References | None,
) -> tuple[Term, ...]:
    """The terms with their baselines: the mean log-ratio of the baseline source, in this step."""
    found = []
    for term in terms:
        if term.baseline is not None:
            assert references is not None, f"{term.name} needs reference log-probs"
            ratios = []
            for of_ranks in packs[term.baseline]:
                micro, token_log_probs = concatenate(of_ranks), lm.log_probs_of_packs(of_ranks)
                ref = torch.stack([references[term.baseline][i] for i in micro.indices])
                ratios.append(segment_sum(token_log_probs, micro.answer_cu_seqlens).cpu() - ref)
            term = term.at_baseline(float(torch.cat(ratios).mean()))
        found.append(term)
    return tuple(found)


def count(term: Term, batch: Mapping[str, list[TokenizedExample]]) -> int:
    """What the term's sum over the step is divided by."""
    sequences = [s for name in term.over or (term.source,) for s in batch.get(name, ())]
    everywhere = term.positions == "all"
    tokens = sum(len(s.input_ids) if everywhere else s.answer_length for s in sequences)
    return {"mean": len(sequences), "token_mean": tokens, "sum": 1}[term.reduction]
