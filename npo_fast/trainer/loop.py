"""The training loop: fine-tuning and every unlearning method, one step record at a time."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from npo_fast.data import PackedBatch, Sequence, pack
from npo_fast.errors import NonFiniteError
from npo_fast.losses import KL
from npo_fast.methods import Term, turns
from npo_fast.model.causal_lm import CausalLM
from npo_fast.ops import SequenceLoss, linear_log_probs, linear_sequence_loss, segment_sum
from npo_fast.trainer.order import driving_sources, side_by_side, step_batches, steps_per_epoch
from npo_fast.trainer.out_of_memory import halved, is_out_of_memory
from npo_fast.trainer.reference_cache import ReferenceCache
from npo_fast.trainer.settings import StepRecord, TrainSettings
from npo_fast.trainer.state import TrainState, random_state, set_random_state

Sources = Mapping[str, list[Sequence]]
References = Mapping[str, Tensor | list[Tensor]]  # source -> a number, or (n,), a sequence


def train(
    lm: CausalLM,
    sources: Sources,
    terms: tuple[Term, ...],
    settings: TrainSettings,
    references: References | None = None,
    reference_cache: ReferenceCache | None = None,
    state: TrainState | None = None,
) -> Iterator[StepRecord]:
    """Minimises ``sum(term.coefficient * term)`` and yields a record after every step.

    An epoch is one pass over the *driving* sources: the forget questions with one or more answers,
    or the retain data where a method has nothing else. Each batch takes ``batch_size`` of their
    sequences and as many to retain, drawn without repetition until those are used up. It makes one
    step on the sum of the terms, or (``schedule="alternating"``) one on each side in turn.
    Micro-batches are packed up to ``micro_batch_tokens``; the loss is exactly that of the whole
    batch.

    Args:
        sources: tokenised data by source name; those that no term uses are left alone.
        references: what ``reference_log_probs`` returned, where a term needs it.
        reference_cache: hidden states of the reference, where a term is a KL.
        state: where to begin, with the weights of that step in ``lm``; kept up to date, so that
            it can be saved after any step. None begins at step 0.

    Raises:
        OutOfMemory: one sequence alone does not fit; weights as below.
        NonFiniteError: a loss or gradient is NaN or infinite; the weights are those of the last
            good step, and the message names the step and the samples.
    """
    model = lm.model
    sources = {name: sources[name] for term in terms for name in term.reads}
    driving = driving_sources(sources)
    each_batch = turns(terms, settings.schedule)
    per_epoch = steps_per_epoch(len(sources[driving[0]]), settings.batch_size) * len(each_batch)
    total = settings.epochs * per_epoch
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    warmup = per_epoch if settings.warmup_steps is None else settings.warmup_steps
    scheduler = LambdaLR(optimizer, lambda done: _linear_schedule(done, warmup, total))
    torch.manual_seed(settings.seed)
    state = TrainState() if state is None else state
    state.attach(lm.device, optimizer=optimizer, scheduler=scheduler)
    state.micro_batch_tokens = state.micro_batch_tokens or settings.micro_batch_tokens
    model.train()

    batches = step_batches(sources, driving, settings.batch_size, settings.epochs, settings.seed)
    steps = ((batch, turn) for batch in batches for turn in each_batch)
    for batch, turn in islice(steps, state.step, None):
        started = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"]
        batch = {name: batch[name] for term in turn for name in term.reads}
        values, log_probs = whole_gradient(lm, batch, turn, state, references, reference_cache)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)

        record = StepRecord(
            step=state.step + 1,
            steps=total,
            epoch=(state.step + 1) / per_epoch,
            loss=sum(term.coefficient * float(values[term.name]) for term in turn),
            terms={name: float(value) for name, value in values.items()},
            log_probs={source: float(value) for source, value in log_probs.items()},
            grad_norm=float(grad_norm),
            lr=lr,
            tokens=sum(len(s.input_ids) for sequences in batch.values() for s in sequences),
            micro_batch_tokens=state.micro_batch_tokens,
            time_ms=0.0,
        )
        if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
            optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(_non_finite_message(record, batch))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        state.step = record.step
        elapsed = 1e3 * (time.perf_counter() - started)
        yield StepRecord(**{**vars(record), "time_ms": elapsed})


def whole_gradient(
    lm: CausalLM,
    batch: Mapping[str, list[Sequence]],
    terms: tuple[Term, ...],
    state: TrainState,
    references: References | None,
    reference_cache: ReferenceCache | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of one step, in smaller micro-batches where memory runs out.

    A second try begins with no gradient and with the random numbers of the first: it makes the
    step that smaller micro-batches would have made from the start. They stay small afterwards.
    """
    while True:
        assert state.micro_batch_tokens is not None
        random = random_state(lm.device)
        try:
            return accumulate(
                lm, batch, terms, state.micro_batch_tokens, references, reference_cache
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # here, where the error has let go of its frames and they of their activations
        lm.model.zero_grad(set_to_none=True)
        set_random_state(random, lm.device)
        if lm.device.type == "cuda":
            torch.cuda.empty_cache()
        units = [
            sum(len(batch[name][i].input_ids) for name in stream)
            for stream in dict.fromkeys(term.stream for term in terms)
            for i in range(len(batch[stream[0]]))
        ]
        state.micro_batch_tokens = halved(state.micro_batch_tokens, units, state.step + 1, reason)


def accumulate(
    lm: CausalLM,
    batch: Mapping[str, list[Sequence]],
    terms: tuple[Term, ...],
    micro_batch_tokens: int,
    references: References | None,
    reference_cache: ReferenceCache | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adds the gradient of the whole batch, a micro-batch at a time.

    Returns the value of each term and the mean log-prob of a sequence of each source.
    """
    packs = {name: pack(batch[name], micro_batch_tokens) for name in batch}
    terms = with_baselines(lm, terms, packs, references)
    counts = {term.name: count(term, batch) for term in terms}
    values = dict.fromkeys(counts, torch.zeros((), device=lm.device))
    log_probs: dict[str, Tensor] = {}
    for stream in dict.fromkeys(term.stream for term in terms):
        own = [term for term in terms if term.stream == stream]
        sums = torch.zeros(len(stream), device=lm.device)
        sequences = side_by_side(batch, stream)
        for micro in pack(sequences, micro_batch_tokens, group=len(stream)):
            loss, found, sequence_log_probs = micro_step(
                lm, micro, own, counts, references, reference_cache
            )
            loss.backward()
            for name, value in found.items():
                values[name] = values[name] + value
            sums = sums + sequence_log_probs.view(-1, len(stream)).sum(dim=0)
        log_probs |= zip(stream, sums / len(batch[stream[0]]), strict=True)
    return values, log_probs


def micro_step(
    lm: CausalLM,
    micro: PackedBatch,
    terms: Iterable[Term],
    counts: Mapping[str, int | Tensor],
    references: References | None,
    reference_cache: ReferenceCache | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """This micro-batch's share of the step's loss, of each term, and its sequence log-probs.

    The terms are those of one stream, whose sources take turns in the micro-batch.
    """
    micro = micro.to(lm.device)
    states = lm.states(micro)
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
    of_each = [references[name][i] for name, i in zip(cycle(term.stream), micro.indices)]
    join = torch.stack if loss.reference == "sequence" else torch.cat
    return join(of_each).to(micro.labels.device)


@torch.no_grad()
def with_baselines(
    lm: CausalLM,
    terms: Iterable[Term],
    packs: Mapping[str, Iterable[PackedBatch]],  # source -> its sequences of the whole step
    references: References | None,
) -> tuple[Term, ...]:
    """The terms with their baselines: the mean log-ratio of the baseline source, in this step."""
    found = []
    for term in terms:
        if term.baseline is not None:
            assert references is not None, f"{term.name} needs reference log-probs"
            ratios = []
            for micro in packs[term.baseline]:
                ref = torch.stack([references[term.baseline][i] for i in micro.indices])
                token_log_probs = lm.log_probs(micro.to(lm.device))
                ratios.append(segment_sum(token_log_probs, micro.answer_cu_seqlens).cpu() - ref)
            term = term.at_baseline(float(torch.cat(ratios).mean()))
        found.append(term)
    return tuple(found)


@torch.no_grad()
def reference_log_probs(
    lm: CausalLM, sources: Sources, terms: tuple[Term, ...], micro_batch_tokens: int
) -> dict[str, Tensor | list[Tensor]]:
    """Log-probs under the model as it is now, of the sources that a term compares with them.

    One float a sequence, (S,), or where the loss wants them one a token, S tensors (n,): no
    reference model stays in memory while training.
    """
    references: dict[str, Tensor | list[Tensor]] = {}
    was_training = lm.model.training
    lm.model.eval()
    compared = [term for term in terms if term.loss.reference in ("sequence", "token")]
    kinds = {name: term.loss.reference for term in compared for name in term.reads}
    for source, kind in kinds.items():
        found = [torch.empty(0)] * len(sources[source])
        for batch in pack(sources[source], micro_batch_tokens):
            log_probs = lm.log_probs(batch.to(lm.device))
            if kind == "sequence":
                of_each = segment_sum(log_probs, batch.answer_cu_seqlens).cpu().unbind()
            else:
                of_each = log_probs.cpu().split(batch.answer_cu_seqlens.diff().tolist())
            for i, one in zip(batch.indices, of_each, strict=True):
                found[i] = one
        references[source] = torch.stack(found) if kind == "sequence" else found
    lm.model.train(was_training)
    return references


def count(term: Term, batch: Mapping[str, list[Sequence]]) -> int:
    """What the term's sum over the step is divided by."""
    sequences = [s for name in term.over or (term.source,) for s in batch.get(name, ())]
    everywhere = term.positions == "all"
    tokens = sum(len(s.input_ids) if everywhere else s.answer_length for s in sequences)
    return {"mean": len(sequences), "token_mean": tokens, "sum": 1}[term.reduction]


def _linear_schedule(done: int, warmup: int, total: int) -> float:
    if done < warmup:
        return (done + 1) / warmup
    return max(0.0, (total - done) / max(1, total - warmup))


def _non_finite_message(record: StepRecord, batch: Mapping[str, list[Sequence]]) -> str:
    shown = "; ".join(
        f"{source} records {', '.join(str(s.index + 1) for s in sequences[:8])}"
        + (f" and {len(sequences) - 8} more" if len(sequences) > 8 else "")
        for source, sequences in batch.items()
    )
    values = ", ".join(f"{name} {value:.4g}" for name, value in record.terms.items())
    return (
        f"step {record.step}: the loss is {record.loss:.4g} ({values}) with gradient norm "
        f"{record.grad_norm:.4g}; the weights stay those of step {record.step - 1}. "
        f"Samples: {shown}. A smaller --lr or fp32 weights (--dtype fp32) usually cure it"
    )
