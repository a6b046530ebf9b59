"""The training loop: fine-tuning and every unlearning method, one step record at a time."""

import math
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from npo_fast.data import PackedBatch, Sequence, pack
from npo_fast.errors import NonFiniteError
from npo_fast.methods import Term
from npo_fast.model.causal_lm import CausalLM
from npo_fast.ops import linear_sequence_loss, segment_sum
from npo_fast.trainer.order import step_batches, steps_per_epoch
from npo_fast.trainer.settings import StepRecord, TrainSettings

Sources = Mapping[str, list[Sequence]]


def train(
    lm: CausalLM,
    sources: Sources,
    terms: tuple[Term, ...],
    settings: TrainSettings,
    references: Mapping[str, Tensor] | None = None,
) -> Iterator[StepRecord]:
    """Minimises ``sum(term.coefficient * term)`` and yields a record after every step.

    An epoch is one pass over the *driving* source: the forget data, or the retain data where a
    method has no forget term. Each step takes ``batch_size`` of its sequences and as many of every
    other source, drawn without repetition until that source is used up. Micro-batches are packed
    up to ``micro_batch_tokens``; the loss is exactly that of the whole batch.

    Args:
        sources: tokenised data by source name; those that no term uses are left alone.
        references: what ``reference_log_probs`` returned, where a term needs it.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the weights are those of the last
            good step, and the message names the step and the samples.
    """
    model = lm.model
    sources = {name: sources[name] for name in {term.source: None for term in terms}}
    driving = "forget" if "forget" in sources else next(iter(sources))
    per_epoch = steps_per_epoch(len(sources[driving]), settings.batch_size)
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
    model.train()

    batches = step_batches(sources, driving, settings.batch_size, settings.epochs, settings.seed)
    for step, batch in enumerate(batches, start=1):
        started = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"]
        values = dict.fromkeys((term.name for term in terms), torch.zeros((), device=lm.device))
        log_probs: dict[str, float | Tensor] = {}
        for source, sequences in batch.items():
            own = [term for term in terms if term.source == source]
            counts = _counts(sequences)
            log_probs[source] = 0.0
            for micro in pack(sequences, settings.micro_batch_tokens):
                loss, found, sequence_log_probs = micro_step(lm, micro, own, counts, references)
                loss.backward()
                for name, value in found.items():
                    values[name] = values[name] + value
                log_probs[source] += sequence_log_probs.sum() / len(sequences)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)

        record = StepRecord(
            step=step,
            steps=total,
            epoch=step / per_epoch,
            loss=sum(term.coefficient * float(values[term.name]) for term in terms),
            terms={name: float(value) for name, value in values.items()},
            log_probs={source: float(value) for source, value in log_probs.items()},
            grad_norm=float(grad_norm),
            lr=lr,
            tokens=sum(len(s.input_ids) for sequences in batch.values() for s in sequences),
            time_ms=0.0,
        )
        if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
            optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(_non_finite_message(record, batch))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        elapsed = 1e3 * (time.perf_counter() - started)
        yield StepRecord(**{**vars(record), "time_ms": elapsed})


def micro_step(
    lm: CausalLM,
    micro: PackedBatch,
    terms: list[Term],
    counts: Mapping[str, int | Tensor],
    references: Mapping[str, Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """This micro-batch's share of the step's loss, of each term, and its sequence log-probs."""
    micro = micro.to(lm.device)
    hidden = lm.hidden(micro)
    loss = hidden.new_zeros((), dtype=torch.float32)
    values = {}
    for term in terms:
        value, sequence_log_probs = linear_sequence_loss(
            hidden,
            labels=micro.labels,
            cu_seqlens=micro.answer_cu_seqlens,
            loss=term.loss,
            ref_log_probs=_reference(term, micro, references),
            reduction="sum",
            **lm.head_arguments,
        )
        value = value / counts[term.reduction]
        values[term.name] = value.detach()
        loss = loss + term.coefficient * value
    return loss, values, sequence_log_probs


def _reference(
    term: Term, micro: PackedBatch, references: Mapping[str, Tensor] | None
) -> Tensor | None:
    if term.loss.reference is None:
        return None
    assert references is not None, f"{term.name} needs reference log-probs"
    return references[term.source][list(micro.indices)].to(micro.labels.device)


@torch.no_grad()
def reference_log_probs(
    lm: CausalLM, sources: Sources, terms: tuple[Term, ...], micro_batch_tokens: int
) -> dict[str, Tensor]:
    """Log-prob of every sequence under the model as it is now, for the terms that need it.

    One float a sequence, so no reference model stays in memory while training.
    """
    references: dict[str, Tensor] = {}
    was_training = lm.model.training
    lm.model.eval()
    for source in {term.source for term in terms if term.loss.reference == "sequence"}:
        found = torch.zeros(len(sources[source]))
        for batch in pack(sources[source], micro_batch_tokens):
            token_log_probs = lm.log_probs(batch.to(lm.device))
            found[list(batch.indices)] = segment_sum(token_log_probs, batch.answer_cu_seqlens).cpu()
        references[source] = found
    lm.model.train(was_training)
    return references


def _counts(sequences: list[Sequence]) -> dict[str, int]:
    """What a sum over the step's batch is divided by, for each reduction."""
    tokens = sum(s.answer_length for s in sequences)
    return {"mean": len(sequences), "token_mean": tokens, "sum": 1}


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
