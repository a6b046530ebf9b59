"""A run before any weight is loaded: its tokens, what ``run.json`` says of it, where it resumes."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from npo_fast.data import (
    Record,
    Template,
    TokenizedExample,
    check_vocabulary,
    data_fingerprint,
    repeats,
    text_fingerprint,
)
from npo_fast.distributed import is_main_process, world_size
from npo_fast.errors import UserError, named
from npo_fast.methods import METHODS, Term, schedule_steps
from npo_fast.model.causal_lm import CausalLM
from npo_fast.planner.disk import saved_bytes
from npo_fast.runs.callbacks import Callback
from npo_fast.runs.folder import UNFINISHED, read_metadata
from npo_fast.runs.models import ModelSource
from npo_fast.runs.options import RunOptions
from npo_fast.runs.preflight import (
    STEP_BYTES,
    check_file_size,
    check_room,
    reference_needs,
    references_bytes,
    run_need,
    try_saving,
)
from npo_fast.runs.resume import ResumableRun, find_resumable
from npo_fast.trainer.loop import check_settings
from npo_fast.trainer.optimizers import check_optimizer
from npo_fast.trainer.order import check_step_in_backward, primary_sources, step_count
from npo_fast.trainer.settings import TrainSettings, check_world_size

logger = logging.getLogger(__name__)

GIVEN = ("forget", "retain")  # sets whose repeats are told; in fine-tuning they are a way to weigh


@dataclass(frozen=True)
class PreparedRun:
    """All of a run that is known before a weight is loaded."""

    model: ModelSource
    template: Template
    sources: dict[str, list[TokenizedExample]]  # by source of the terms
    terms: tuple[Term, ...]
    training: TrainSettings
    options: RunOptions
    metadata: dict[str, Any]  # of run.json
    resumable: ResumableRun | None  # the run in the output folder that goes on
    callbacks: list[Callback]  # the user's

    @contextmanager
    def loaded(self) -> Iterator[CausalLM]:
        """The model, checked against data and settings before hours are spent."""
        with self.model.loaded(self.resumable) as lm:
            if self.model.in_memory is None:  # the rest is known
                check_vocabulary(self.sources, lm.vocabulary)
                check_settings(lm, self.sources, self.terms, self.training)
                try_saving(lm, self.template.tokenizer)
            else:
                self.check(lm)
            yield lm

    def check(self, lm: CausalLM) -> None:
        """Tries what would fail hours later, with the model as it is, or on the meta device.

        Raises:
            UserError: data or settings that do not fit the model, a model or tokenizer that cannot
                be saved, or too little room for what the run writes.
        """
        options, training, sources = self.options, self.training, self.sources
        check_vocabulary(sources, lm.vocabulary)
        check_settings(lm, sources, self.terms, training, self.model.device())
        beside = try_saving(lm, self.template.tokenizer)
        dtype = None if lm.adapted and not options.merge else lm.saved_dtype
        saved = saved_bytes(lm.model, training.optimizer, dtype, options.merge, beside)
        steps = self.metadata["steps"]
        checkpoints = (steps - 1) // options.save_every if options.save_every else 0
        records = references_bytes(sources, self.terms) + STEP_BYTES * steps
        settings = self.metadata["settings"]
        best = settings.get("watch", {}).get("keep_best") is not None
        cache = settings.get("method", {}).get("reference_cache")
        if is_main_process():
            check_room([
                run_need(options.output, saved, checkpoints, best, records),
                *reference_needs(sources, self.terms, lm, cache),
            ])  # fmt: skip
        states = saved.checkpoint - saved.weights if checkpoints else 0
        check_file_size(max(states, min(saved.weights, lm.max_shard_bytes or saved.weights)))


def prepare_run(
    verb: str,
    model: ModelSource,
    records: Mapping[str, list[Record]],  # source -> its records
    names: Mapping[str, str],  # source -> what the user calls it
    terms: tuple[Term, ...],
    settings: Mapping[str, Any],  # dataclasses by group, "training" and "run" among them
    callbacks: Iterable[Callback],
) -> PreparedRun:
    """Tokenises every source once, and looks for a run to go on with.

    Raises:
        UserError: settings, records, tokenizer and output folder that do not fit together.
    """
    training, options = settings["training"], settings["run"]
    heard = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    if not all(isinstance(callback, Callback) for callback in heard):
        raise UserError(f"callbacks must be Callback objects, got {callbacks!r}")
    model.device()
    template = model.template(_date_of_unfinished(options))
    check_world_size(terms, training, world_size())
    check_optimizer(training.optimizer)
    step_terms = schedule_steps(terms, training.schedule)
    sources, described = {}, {}
    for source, rows in records.items():
        with named(f"{source} ({names[source]})"):
            examples, truncated = template.encode_all(rows)
        tokens = sum(len(example.input_ids) for example in examples)
        cut = f", {truncated} cut to {template.max_length}" if truncated else ""
        logger.info(f"{source}: {len(rows)} records, {tokens} tokens{cut} ({names[source]})")
        sources[source] = examples
        described[source] = {
            "records": len(rows),
            "records_sha256": text_fingerprint(rows),
            "examples": len(examples),
            "tokens": tokens,
            "answer_tokens": sum(example.answer_length for example in examples),
            "truncated": truncated,
            "sha256": data_fingerprint(examples),
        }
    given = {name: rows for name, rows in records.items() if name in GIVEN}
    for sentence in repeats(given):
        logger.warning(f"warning: {sentence}")
    if training.step_in_backward:
        check_step_in_backward(sources, terms, training)
    (primary, *_) = primary_sources({s: sources[s] for term in terms for s in term.reads})
    steps = step_count(len(sources[primary]), training) * len(step_terms)
    logger.info(f"{training.epochs} epochs of {training.batch_size} a step: {steps} steps")
    metadata = {
        "command": verb,
        "settings": {name: asdict(group) for name, group in settings.items()},
        "rendering": template.description(),
        "data": described,
        "steps": steps,
    }
    if "method" in settings and settings["method"].method not in METHODS:
        metadata["terms"] = [repr(term) for term in terms]  # so that other terms do not resume
    resumable = find_resumable(options, metadata, model.in_memory is not None)
    prepared = PreparedRun(
        model, template, sources, terms, training, options, metadata, resumable, heard
    )
    if model.in_memory is None or (options.dry_run and model.options.lora_rank):
        prepared.check(model.without_weights())
    elif options.dry_run:
        with model.loaded() as lm:
            prepared.check(lm)
    return prepared


def _date_of_unfinished(options: RunOptions) -> datetime | None:
    """The date that the templates of an unfinished run in the output folder print."""
    metadata = {} if options.overwrite else read_metadata(options.output)
    now = metadata.get("rendering", {}).get("now")
    return datetime.fromisoformat(now) if now and metadata.get("status") in UNFINISHED else None
