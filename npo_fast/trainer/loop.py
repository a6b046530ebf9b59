"""The training loop: fine-tuning and every unlearning method, one step record at a time."""

import math
import time
from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from npo_fast.data import TokenizedExample, concatenate, micro_batches
from npo_fast.errors import (
    NonFiniteError,
    OutOfMemory,
    PartialUpdateError,
    PartialUpdateOutOfMemory,
    UserError,
)
from npo_fast.methods import Term, schedule_steps
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.reference_states import ReferenceStates
from npo_fast.ops import segment_sum
from npo_fast.trainer.optimizers import build_optimizer, trained
from npo_fast.trainer.order import (
    check_step_in_backward,
    primary_sources,
    step_batches,
    steps_per_epoch,
)
from npo_fast.trainer.out_of_memory import is_out_of_memory
from npo_fast.trainer.settings import StepRecord, TrainSettings, check_world_size
from npo_fast.trainer.state import TrainState
from npo_fast.trainer.step import References, Sources, whole_gradient
from npo_fast.trainer.update import StepInBackward, Update, WholeStep


def train(
    lm: CausalLM,
    sources: Sources,
    terms: tuple[Term, ...],
    settings: TrainSettings,
    references: References | None = None,
    reference_cache: ReferenceStates | None = None,
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

    ``step_in_backward`` takes the whole step through the model at once, and never holds all
    gradients; ``StepInBackward`` says how it clips.

    Raises:
        OutOfMemory: one sequence alone, or a whole step in the backward, does not fit; weights as
            below.
        TornOutOfMemory: the optimizer's step does not fit, after some tensors may have taken it.
        NonFiniteError: a loss or gradient is NaN or infinite; the weights are those of the last
            good step, and the message names the step and the samples.
        TornStepError: the same with ``step_in_backward`` and no clipping, where a gradient is found
            not to be finite after other tensors took their step.
        UserError: settings that do not fit the model, the data or the device.
    """
    check_settings(lm, sources, terms, settings)
    model = lm.model
    sources = {name: sources[name] for term in terms for name in term.reads}
    primary = primary_sources(sources)
    each_batch = schedule_steps(terms, settings.schedule)
    per_epoch = steps_per_epoch(len(sources[primary[0]]), settings.batch_size) * len(each_batch)
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
    state = TrainState() if state is None else state
    torch.manual_seed(settings.seed + (2 * state.step + 1 << 32) * lm.rank)  # 0 on the first
    state.attach(lm.device, lm.world_size == 1, optimizer=optimizer, scheduler=scheduler)
    known = state.micro_batch_tokens or settings.micro_batch_tokens
    state.micro_batch_tokens = min(known, settings.micro_batch_tokens)
    model.train()

    batches = step_batches(sources, primary, settings.batch_size, settings.epochs, settings.seed)
    steps = ((batch, turn) for batch in batches for turn in each_batch)
    for batch, turn in islice(steps, state.step, None):
        started = time.perf_counter()
        lr = float(optimizer.param_groups[0]["lr"])
        batch = {name: batch[name] for term in turn for name in term.reads}
        values, log_probs = whole_gradient(
            lm, batch, turn, settings, state, update, references, reference_cache
        )
        loss = sum(term.coefficient * values[term.name] for term in turn)
        try:
            grad_norm = update.apply(loss)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            no_room = PartialUpdateOutOfMemory if update.started else OutOfMemory
            raise no_room(_no_room(state.step + 1, error, update.started)) from error
        record = StepRecord(
            step=state.step + 1,
            steps=total,
            epoch=(state.step + 1) / per_epoch,
            loss=loss,
            terms=values,
            log_probs=log_probs,
            grad_norm=grad_norm,
            lr=lr,
            tokens=sum(len(s.input_ids) for sequences in batch.values() for s in sequences),
            micro_batch_tokens=state.micro_batch_tokens,
            time_ms=1e3 * (time.perf_counter() - started),
        )
        if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
            kind = PartialUpdateError if update.partially_applied else NonFiniteError
            raise kind(_non_finite_message(record, batch, update.partially_applied))
        scheduler.step()
        state.step = record.step
        yield record


def check_settings(
    lm: CausalLM, sources: Sources, terms: tuple[Term, ...], settings: TrainSettings
) -> None:
    """What ``train`` would refuse, at once.

    Raises:
        UserError: settings that do not fit the model, the data or the device.
    """
    trained(lm.model.parameters(), settings.optimizer)
    check_world_size(terms, settings, lm.world_size)
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
        for packs in micro_batches(sources[source], micro_batch_tokens, world_size=lm.world_size):
            batch, log_probs = concatenate(packs), lm.log_probs_of_packs(packs)
            if kind == "sequence":
                of_each = segment_sum(log_probs, batch.answer_cu_seqlens).cpu().unbind()
            else:
                of_each = log_probs.cpu().split(batch.answer_cu_seqlens.diff().tolist())
            for i, one in zip(batch.indices, of_each, strict=True):
                found[i] = one
        references[source] = torch.stack(found) if kind == "sequence" else found
    lm.model.train(was_training)
    return references


def _linear_schedule(done: int, warmup: int, total: int) -> float:
    if done < warmup:
        return (done + 1) / warmup
    return max(0.0, (total - done) / max(1, total - warmup))


def _no_room(step: int, error: BaseException, in_optimizer: bool) -> str:
    reason = str(error).partition("\n")[0]
    if not in_optimizer:
        return (
            f"step {step}: out of memory in the backward ({reason}), and --step-in-backward takes "
            "a whole step at once; add --gradient-checkpointing or lower --batch-size"
        )
    return (
        f"step {step}: out of memory in the optimizer's step ({reason}), which smaller "
        "micro-batches do not cure; add --optimizer adamw-8bit, --offload-optimizer, "
        "--step-in-backward (with a smaller --batch-size where it is there), or train an adapter "
        "with --lora-rank 16"
    )


def _non_finite_message(
    record: StepRecord, batch: Mapping[str, list[TokenizedExample]], partially_applied: int
) -> str:
    shown = "; ".join(
        f"{source} records {', '.join(str(s.index + 1) for s in sequences[:8])}"
        + (f" and {len(sequences) - 8} more" if len(sequences) > 8 else "")
        for source, sequences in batch.items()
    )
    values = ", ".join(f"{name} {value:.4g}" for name, value in record.terms.items())
    kept = f"the weights stay those of step {record.step - 1}"
    if partially_applied:
        kept = (
            f"{partially_applied} tensors had taken their step by then, so these weights are of no "
            "use (a finite --max-grad-norm measures the norm first)"
        )
    return (
        f"step {record.step}: the loss is {record.loss:.4g} ({values}) with gradient norm "
        f"{record.grad_norm:.4g}; {kept}. "
        f"Samples: {shown}. A smaller --lr or fp32 weights (--dtype fp32) usually cure it"
    )
