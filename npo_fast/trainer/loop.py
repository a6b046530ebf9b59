"""The training loop: fine-tuning and every unlearning method, one step record at a time."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from npo_fast.data import PackedBatch, Sequence, join, pack
from npo_fast.errors import NonFiniteError, TornStepError, UserError
from npo_fast.losses import KL
from npo_fast.methods import Term, turns
from npo_fast.model.causal_lm import CausalLM
from npo_fast.ops import SequenceLoss, linear_log_probs, linear_sequence_loss, segment_sum
from npo_fast.trainer.optimizers import build_optimizer, trained
from npo_fast.trainer.order import (
    check_step_in_backward,
    driving_sources,
    side_by_side,
    step_batches,
    steps_per_epoch,
)
from npo_fast.trainer.reference_cache import ReferenceCache
from npo_fast.trainer.settings import StepRecord, TrainSettings
from npo_fast.trainer.update import StepInBackward, Update, WholeStep

Sources = Mapping[str, list[Sequence]]
Stream = tuple[str, ...]  # sources whose sequences take turns in a micro-batch
References = Mapping[str, Tensor | list[Tensor]]  # source -> a number, or (n,), a sequence


def train(
    lm: CausalLM,
    sources: Sources,
    terms: tuple[Term, ...],
    settings: TrainSettings,
    references: References | None = None,
    reference_cache: ReferenceCache | None = None,
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

    ``step_in_backward`` takes the whole step through the model at once, and never holds all
    gradients; ``StepInBackward`` says how it clips.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the weights are those of the last
            good step, and the message names the step and the samples.
        TornStepError: the same with ``step_in_backward`` and no clipping, where a gradient is found
            not to be finite after other tensors took their step.
        UserError: settings that do not fit the model, the data or the device.
    """
    check_settings(lm, sources, terms, settings)
    model = lm.model
    sources = {name: sources[name] for term in terms for name in term.reads}
    driving = driving_sources(sources)
    each_batch = turns(terms, settings.schedule)
    per_epoch = steps_per_epoch(len(sources[driving[0]]), settings.batch_size) * len(each_batch)
    total = settings.epochs * per_epoch
    optimizer = build_optimizer(
        model.parameters(), settings.optimizer, settings.lr, settings.weight_decay
    )
    kind_of_update = StepInBackward if settings.step_in_backward else WholeStep
    update: Update = kind_of_update(optimizer, settings.max_grad_norm, settings.offload_optimizer)
    if settings.gradient_checkpointing:
        lm.recompute_activations()
    warmup = per_epoch if settings.warmup_steps is None else settings.warmup_steps
    scheduler = LambdaLR(optimizer, lambda done: _linear_schedule(done, warmup, total))
    torch.manual_seed(settings.seed)
    model.train()

    batches = step_batches(sources, driving, settings.batch_size, settings.epochs, settings.seed)
    steps = ((batch, turn) for batch in batches for turn in each_batch)
    for step, (batch, turn) in enumerate(steps, start=1):
        started = time.perf_counter()
        lr = float(optimizer.param_groups[0]["lr"])
        batch = {name: batch[name] for term in turn for name in term.reads}
        packs = {name: pack(batch[name], settings.micro_batch_tokens) for name in batch}
        turn = with_baselines(lm, turn, packs, references)
        counts = {term.name: count(term, batch) for term in turn}
        values = dict.fromkeys(counts, torch.zeros((), device=lm.device))
        sums: dict[Stream, Tensor] = {}
        for together in _passes(batch, turn, settings):
            loss, found, log_prob_sums = _forward(
                lm, together, turn, counts, references, reference_cache
            )
            update.add(loss)
            for name, value in found.items():
                values[name] = values[name] + value
            for stream, value in log_prob_sums.items():
                sums[stream] = sums[stream] + value if stream in sums else value
        whole_loss = sum(term.coefficient * float(values[term.name]) for term in turn)
        grad_norm = update.apply(whole_loss)
        record = StepRecord(
            step=step,
            steps=total,
            epoch=step / per_epoch,
            loss=whole_loss,
            terms={name: float(value) for name, value in values.items()},
            log_probs={
                source: float(value) / len(batch[source])
                for stream, of_each in sums.items()
                for source, value in zip(stream, of_each, strict=True)
            },
            grad_norm=grad_norm,
            lr=lr,
            tokens=sum(len(s.input_ids) for sequences in batch.values() for s in sequences),
            time_ms=1e3 * (time.perf_counter() - started),
        )
        if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
            kind = TornStepError if update.torn else NonFiniteError
            raise kind(_non_finite_message(record, batch, update.torn))
        scheduler.step()
        yield record


def check_settings(
    lm: CausalLM, sources: Sources, terms: tuple[Term, ...], settings: TrainSettings
) -> None:
    """What ``train`` would refuse, at once.

    Raises:
        UserError: settings that do not fit the model, the data or the device.
    """
    trained(lm.model.parameters(), settings.optimizer)
    if settings.offload_optimizer and lm.device.type == "cpu":
        raise UserError(
            "--offload-optimizer keeps states in CPU memory, and on a CPU they lie there anyway: "
            "leave it out"
        )
    if settings.step_in_backward:
        if not lm.packs:
            raise UserError(
                f"--step-in-backward takes a whole step at once, and {lm.name} takes one sequence "
                "at a time: leave it out"
            )
        check_step_in_backward(sources, terms, settings)


def _passes(
    batch: Mapping[str, list[Sequence]], turn: Iterable[Term], settings: TrainSettings
) -> list[list[tuple[Stream, PackedBatch]]]:
    """What goes through the model at a time: a micro-batch of one stream, or the whole step."""
    limit = sys.maxsize if settings.step_in_backward else settings.micro_batch_tokens
    micros: list[tuple[Stream, PackedBatch]] = [
        (stream, micro)
        for stream in dict.fromkeys(term.stream for term in turn)
        for micro in pack(side_by_side(batch, stream), limit, group=len(stream))
    ]
    return [micros] if settings.step_in_backward else [[one] for one in micros]


def _forward(
    lm: CausalLM,
    together: list[tuple[Stream, PackedBatch]],
    turn: Iterable[Term],
    counts: Mapping[str, int],
    references: References | None,
    reference_cache: ReferenceCache | None,
) -> tuple[Tensor, dict[str, Tensor], dict[Stream, Tensor]]:
    """Loss and terms of one pass through the model, and the summed log-probs of each source."""
    packs = [micro.to(lm.device) for _, micro in together]
    parts = lm.states(join(packs)).split([len(micro.input_ids) for micro in packs])
    loss = torch.zeros((), device=lm.device)
    values: dict[str, Tensor] = {}
    sums: dict[Stream, Tensor] = {}
    for (stream, _), micro, states in zip(together, packs, parts, strict=True):
        own = [term for term in turn if term.stream == stream]
        value, found, log_probs = micro_step(
            lm, micro, own, counts, references, reference_cache, states
        )
        loss = loss + value
        values |= found
        sums[stream] = log_probs.view(-1, len(stream)).sum(dim=0)
    return loss, values, sums


def micro_step(
    lm: CausalLM,
    micro: PackedBatch,
    terms: Iterable[Term],
    counts: Mapping[str, int | Tensor],
    references: References | None,
    reference_cache: ReferenceCache | None = None,
    states: Tensor | None = None,  # (T, D)
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """This micro-batch's share of the step's loss, of each term, and its sequence log-probs.

    The terms are those of one stream, whose sources take turns in the micro-batch; ``states`` are
    the model's, where they are known.
    """
    micro = micro.to(lm.device)
    if states is None:
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


def _non_finite_message(record: StepRecord, batch: Mapping[str, list[Sequence]], torn: int) -> str:
    shown = "; ".join(
        f"{source} records {', '.join(str(s.index + 1) for s in sequences[:8])}"
        + (f" and {len(sequences) - 8} more" if len(sequences) > 8 else "")
        for source, sequences in batch.items()
    )
    values = ", ".join(f"{name} {value:.4g}" for name, value in record.terms.items())
    kept = f"the weights stay those of step {record.step - 1}"
    if torn:
        kept = (
            f"{torn} tensors had taken their step by then, so these weights are of no use (a "
            "finite --max-grad-norm measures the norm first)"
        )
    return (
        f"step {record.step}: the loss is {record.loss:.4g} ({values}) with gradient norm "
        f"{record.grad_norm:.4g}; {kept}. "
        f"Samples: {shown}. A smaller --lr or fp32 weights (--dtype fp32) usually cure it"
    )
