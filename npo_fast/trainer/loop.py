"""The training loop: fine-tuning and every unlearning method, one step record at a time."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npo_fast import watch
from npo_fast.data import Sources
from npo_fast.errors import NonFiniteError, PartialUpdateError, UserError
from npo_fast.methods import Term, schedule_steps
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.layers import repeated_layers
from npo_fast.model.reference_log_probs import check_cache, reference_log_probs_of, states_name
from npo_fast.model.reference_states import ReferenceStates, cache_of, open_reference_states
from npo_fast.trainer.optimizers import build_optimizer, build_scheduler, trainable_parameters
from npo_fast.trainer.order import (
    batch_keys,
    check_step_in_backward,
    primary_sources,
    step_batches,
    step_count,
)
from npo_fast.trainer.retain_weight import RetainWeight, check_keep_utility
from npo_fast.trainer.settings import StepRecord, TrainSettings
from npo_fast.trainer.state import TrainState
from npo_fast.trainer.step import References, layer_of, take_step
from npo_fast.trainer.update import StepInBackward, Update

logger = logging.getLogger(__name__)


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

    An epoch is one pass over the primary sources: the forget questions with one or more answers,
    or the retain data where a method has nothing else. Each batch takes ``batch_size`` of their
    sequences (``last_batch`` says what becomes of the rest of an epoch) and as many to retain,
    drawn without repetition until those are used up. It makes one
    step on the sum of the terms, or (``schedule="alternating"``) one on each side in turn.
    However small the micro-batches are, the loss is exactly that of the whole batch.

    Args:
        sources: tokenised data by source name, of which some may not be used by any term.
        references: what ``reference_log_probs`` returned, where a term needs it.
        reference_cache: hidden states of the reference, where a term is a KL.
        state: where to begin, with the weights of that step in ``lm`` (None: at step 0). It is kept
            up to date and can be saved after any step.

    Raises:
        OutOfMemory: one sequence, or with ``step_in_backward`` one step, does not fit.
        NonFiniteError: a loss or gradient is NaN or infinite; the message names the samples.
        PartialUpdateOutOfMemory, PartialUpdateError: the same, but some weights may have changed;
            with the others the weights are those of the last step.
        UserError: settings that do not fit the model, the data or the device.
    """
    check_settings(lm, sources, terms, settings)
    terms = tuple(term.seeded(settings.seed) for term in terms)
    sources = {name: sources[name] for term in terms for name in term.reads}
    primary = primary_sources(sources)
    terms_by_step = schedule_steps(terms, settings.schedule)  # of the steps on each batch
    questions, turns = len(sources[primary[0]]), len(terms_by_step)
    total = turns * step_count(questions, settings)
    per_epoch = total / settings.epochs
    if settings.last_batch == "carry":
        per_epoch = turns * questions / settings.batch_size
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = turns * (questions // settings.batch_size)
    if 0 < total <= warmup:
        what = "its rate is 0 and it changes nothing" if total == 1 else "no step is at --lr"
        which = "the only step is" if total == 1 else f"all {total} steps are"
        logger.warning(f"warning: {which} warm-up, {what}: lower --warmup-steps")

    optimizer = build_optimizer(lm.model, settings.optimizer, settings.lr, settings.weight_decay)
    kind_of_update = StepInBackward if settings.step_in_backward else Update
    update = kind_of_update(optimizer, settings.max_grad_norm, settings.offload_optimizer)
    scheduler = build_scheduler(optimizer, settings.lr_schedule, warmup, total)
    if settings.gradient_checkpointing:
        lm.recompute_activations()

    state = TrainState() if state is None else state
    torch.manual_seed(settings.seed + (2 * state.step + 1 << 32) * lm.rank)  # + 0 on the first
    parts: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler}
    weight = None
    if settings.keep_utility is not None:
        assert references is not None, "--keep-utility needs reference log-probs"
        parts["retain_weight"] = weight = RetainWeight(settings.keep_utility, terms, references)
    state.attach(lm, **parts)
    largest = settings.micro_batch_tokens
    state.micro_batch_tokens = min(state.micro_batch_tokens or largest, largest)
    lm.model.train()

    batches = step_batches(sources, primary, settings)
    steps = ((batch, step_terms) for batch in batches for step_terms in terms_by_step)
    for batch, step_terms in islice(steps, state.step, None):
        started = time.perf_counter()
        watch.enter(f"step {state.step + 1}")
        lr = float(optimizer.param_groups[0]["lr"])
        batch = {name: batch[name] for term in step_terms for name in term.reads}
        adapted: dict[str, Any] = {}
        if weight is not None:
            step_terms, adapted["retain_coefficient"] = weight.weigh(step_terms), weight.coefficient
        result = take_step(
            lm, batch, step_terms, settings, state, update, references, reference_cache
        )
        if weight is not None:
            weight.update(batch, result.log_probs)
            adapted["kept_utility"] = weight.kept
        record = StepRecord(
            step=state.step + 1,
            steps=total,
            epoch=(state.step + 1) / per_epoch,
            **vars(result),
            lr=lr,
            tokens=sum(len(s.input_ids) for sequences in batch.values() for s in sequences),
            micro_batch_tokens=state.micro_batch_tokens,
            time_ms=1e3 * (time.perf_counter() - started),
            **adapted,
        )
        if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
            kind = PartialUpdateError if update.partially_applied else NonFiniteError
            applied, rho = update.partially_applied, settings.sharpness_rho
            raise kind(_non_finite_message(record, batch, applied, rho))
        scheduler.step()
        state.step = record.step
        watch.enter(f"after step {state.step}")
        yield record


def check_settings(
    lm: CausalLM,
    sources: Sources,
    terms: tuple[Term, ...],
    settings: TrainSettings,
    device: torch.device | None = None,  # where it will train, if not that of lm
) -> None:
    """Raises ``UserError`` for settings that do not fit the model, the data or the device."""
    trainable_parameters(lm.model.parameters(), settings.optimizer)
    for step_terms in schedule_steps(terms, settings.schedule):
        keys = [None] if settings.step_in_backward else batch_keys(step_terms)
        for key in keys:  # what goes through the decoder together
            layer_of(lm, [term for term in step_terms if key in (None, term.batch_key)])
    if settings.keep_utility is not None:
        check_keep_utility(terms, settings.schedule)
    for term in terms:
        longest = max((e.answer_length for e in sources[term.source]), default=0)
        if 0 < longest <= term.skip_first:
            raise UserError(
                f"--skip-first {term.skip_first} leaves no token of any {term.source} answer: the "
                f"longest has {longest}"
            )
    if settings.offload_optimizer and (device or lm.device).type == "cpu":
        raise UserError(
            "--offload-optimizer keeps states in CPU memory, and on a CPU they lie there anyway: "
            "leave it out"
        )
    if settings.sharpness_rho and all(term.source == "retain" for term in terms):
        raise UserError("--sharpness-rho moves weights up the forget loss, and no term forgets")
    if settings.sharpness_rho and settings.step_in_backward:
        raise UserError(
            "--sharpness-rho needs the gradient of all weights together, and --step-in-backward "
            "frees each as it comes: leave one of them out"
        )
    if settings.step_in_backward and not lm.packs:
        raise UserError(
            f"--step-in-backward takes a whole step at once, and {lm.name} takes one sequence at a "
            "time: leave it out"
        )
    if settings.step_in_backward:
        check_step_in_backward(sources, terms, settings, lm.world_size)


def reference_log_probs(
    lm: CausalLM,
    sources: Sources,
    terms: tuple[Term, ...],
    micro_batch_tokens: int,
    cache: Path | None = None,
    also: Iterable[str] = (),
) -> dict[str, Tensor | list[Tensor]]:
    """Log-probs under the model as it is now, of the sources that a term compares with them.

    A number a sequence, (S,), or where the loss compares tokens a list of S tensors (n,). No
    reference model stays in memory while training. The folder ``cache`` keeps them from run to run.
    ``also`` names other sources, a number a sequence.
    """
    compared = [term for term in terms if term.loss.reference in ("sequence", "token")]
    kinds: dict[str, str | None] = dict.fromkeys(also, "sequence")
    kinds |= {name: term.loss.reference for term in compared for name in term.reads}
    data: Sources = {name: sources[name] for name in kinds}
    found = reference_log_probs_of(lm, data, micro_batch_tokens, cache)
    return {
        name: found[name].sequences if kind == "sequence" else found[name].tokens
        for name, kind in kinds.items()
    }


def reference_cache_for(
    terms: tuple[Term, ...],
    lm: CausalLM,
    sources: Sources,
    micro_batch_tokens: int,
    cache: Path | None = None,
) -> ReferenceStates | None:
    """The ``open_reference_states`` of a method's KL or of its layer; None where it has neither.

    They are kept in the folder ``cache``, beside its log-probs.
    """
    compared = [term for term in terms if term.loss.reference == "hidden"]
    if not compared:
        return None
    positions = {term.positions for term in compared}
    layer = layer_of(lm, compared)
    if len(positions) > 1:
        raise UserError("terms that compare hidden states must all take the same positions")
    if layer is not None:
        depth = len(repeated_layers(lm.decoder))
        logger.info(f"layer {layer} of {depth} (0 to {depth - 1}): no later layer runs or trains")
    if cache is not None:
        check_cache(cache)
    folder = None if cache is None else cache_of(lm, cache) / states_name(layer)
    data: Sources = {term.source: sources[term.source] for term in compared}
    return open_reference_states(lm, data, folder, positions.pop(), micro_batch_tokens, layer)


def _non_finite_message(
    record: StepRecord, batch: Sources, partially_applied: int, rho: float
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
        f"Samples: {shown}. A smaller --lr{' or --sharpness-rho' if rho else ''}, or fp32 weights "
        "(--dtype fp32) usually cure it"
    )
