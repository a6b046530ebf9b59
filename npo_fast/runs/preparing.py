"""A run before any weight is loaded: its tokens, what ``run.json`` says of it, where it resumes."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from npo_fast.data import (
    Record,
    Template,
    TokenizedExample,
    check_apart,
    check_readable,
    data_fingerprint,
    repeats,
    text_fingerprint,
)
from npo_fast.distributed import is_main_process, world_size
from npo_fast.errors import UserError, first_line, named
from npo_fast.methods import METHODS, Term, schedule_steps
from npo_fast.model.attention import NAME as PACKED_ATTENTION
from npo_fast.model.attention import set_attention
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.model_files import check_weights
from npo_fast.model.varlen import NAME as VARLEN_ATTENTION
from npo_fast.paths import below_here
from npo_fast.planner.disk import saved_bytes
from npo_fast.runs.callbacks import Callback, TrackerCallback
from npo_fast.runs.chain import Chain, chain_of
from npo_fast.runs.models import ModelSource
from npo_fast.runs.options import RunOptions
from npo_fast.runs.output import UNFINISHED, found_metadata, read_metadata
from npo_fast.runs.preflight import (
    STEP_BYTES,
    check_file_size,
    check_room,
    interruption,
    reference_needs,
    references_bytes,
    run_need,
    try_saving,
)
from npo_fast.runs.resume import ResumableRun, find_resumable, within_memory
from npo_fast.tables import counted
from npo_fast.trainer.loop import check_settings
from npo_fast.trainer.optimizers import check_optimizer
from npo_fast.trainer.order import check_step_in_backward, primary_sources, step_count
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.state import TrainState

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
    found: bytes | None  # run.json of the output folder, as it is before the run
    resumable: ResumableRun | None  # the run in the output folder that goes on
    callbacks: list[Callback]  # the user's
    chain: Chain  # of the model that it begins with
    link: Callable[[], dict[str, Any]]  # makes ``chain`` of run.json, once the model is loaded

    @contextmanager
    def loaded(self) -> Iterator[CausalLM]:
        """The model, checked against data and settings before hours are spent."""
        with self.model.loaded(self.resumable, self.training.offload_optimizer) as lm:
            self.check(lm)  # again: a download may have filled the disk
            yield lm

    def resumed(
        self, state: TrainState, metadata: dict[str, Any], facts: Mapping[str, Any]
    ) -> "PreparedRun":
        """The run, to go on with what its processes hold in memory."""
        folder, found = self.options.output, found_metadata(self.options.output)
        references = None if self.resumable is None else self.resumable.references
        return replace(
            self, found=found,
            resumable=ResumableRun(folder, metadata, None, state, facts, references),
        )  # fmt: skip

    def check(self, lm: CausalLM) -> list[str]:
        """Tries what would fail hours later, with the model as it is, or on the meta device.

        Returns:
            What the run writes and how much room there is, a sentence for each file system.

        Raises:
            UserError: data or settings that do not fit the model, a model or tokenizer that cannot
                be saved, or too little room for what the run writes.
        """
        options, training, sources = self.options, self.training, self.sources
        check_readable(sources, lm.vocabulary, lm.positions)
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
        cache = None if cache is None else Path(cache)
        if not is_main_process():
            return []
        states = saved.checkpoint - saved.weights if checkpoints else 0
        check_file_size(max(states, min(saved.weights, lm.max_shard_bytes or saved.weights)))
        need = run_need(options.output, saved, checkpoints, best, records)
        room = check_room([need, *reference_needs(sources, self.terms, lm, cache)])
        return [*room, *interruption(need, saved)]


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
    options = settings["run"]
    training = within_memory(options, settings["training"])
    heard = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    if not all(isinstance(callback, Callback) for callback in heard):
        raise UserError(f"callbacks must be Callback objects, got {callbacks!r}")
    if options.track is not None:
        TrackerCallback(options.track)
    model.device()
    template = model.template(_date_of_unfinished(options))
    check_optimizer(training.optimizer)
    step_terms = schedule_steps(terms, training.schedule)
    sources, described = {}, {}
    for source, rows in records.items():
        with named(f"{source} ({names[source]})"):
            examples, truncated = template.encode_all(rows)
        tokens = sum(len(example.input_ids) for example in examples)
        cut = f", {truncated} cut to {template.max_length}" if truncated else ""
        size = f"{counted(len(rows), 'record')}, {counted(tokens, 'token')}{cut}"
        logger.info(f"{source}: {size} ({names[source]})")
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
    check_apart(given.get("forget", ()), given.get("retain", ()))
    chain = chain_of(model)
    if verb == "unlearn":
        chain.tell_repeats(records["forget"])
        if any("retain" in term.reads for term in terms):
            chain.refuse("retain", records["retain"])
        chain.refuse("holdout", records.get("holdout", ()))
    for sentence in repeats(given):
        logger.warning(f"warning: {sentence}")
    if training.step_in_backward:
        check_step_in_backward(sources, terms, training, world_size())
    (primary, *_) = primary_sources({s: sources[s] for term in terms for s in term.reads})
    steps = step_count(len(sources[primary]), training) * len(step_terms)
    epochs = counted(training.epochs, "epoch")
    logger.info(f"{counted(steps, 'step')}: {epochs} in batches of {training.batch_size}")
    metadata = {
        "command": verb,
        "settings": {
            name: {key: _below_here(value) for key, value in asdict(group).items()}
            for name, group in settings.items()
        },
        "rendering": template.description(),
        "data": described,
        "steps": steps,
    }
    if "method" in settings and settings["method"].method not in METHODS:
        metadata["terms"] = [repr(term) for term in terms]  # so that other terms do not resume
    found = found_metadata(options.output)
    model.meet()  # they deal out the files of a checkpoint to check
    resumable = find_resumable(options, metadata, model.in_memory is not None)

    def link() -> dict[str, Any]:
        if verb == "unlearn":
            return chain.forget(records["forget"], model)
        return chain.teach(records["train"])

    prepared = PreparedRun(
        model, template, sources, terms, training, options, metadata, found, resumable, heard,
        chain, link,
    )  # fmt: skip
    for sentence in _rehearse(prepared):
        logger.info(sentence)
    return prepared


def _rehearse(prepared: PreparedRun) -> list[str]:
    """``check`` before a weight is loaded; a model in memory is checked when it is trained."""
    model, dry_run = prepared.model, prepared.options.dry_run
    if model.in_memory is not None and not dry_run:
        return []
    if model.in_memory is not None and not model.options.lora_rank:
        with model.loaded() as lm:
            return prepared.check(lm)
    if model.in_memory is None:
        check_weights(model.name)
    try:
        lm = model.without_weights()
        if model.options.attention not in ("auto", PACKED_ATTENTION, VARLEN_ATTENTION):
            set_attention(lm.model, model.options.attention)
    except UserError:
        raise
    except Exception as error:  # of code that only runs with weights
        logger.warning(
            f"warning: {model.name} cannot be built without weights, so that room and saving are "
            f"checked after it is loaded ({type(error).__name__}: {first_line(error)})"
        )
        return []
    return prepared.check(lm)


def _below_here(value: Any) -> Any:
    """A setting; a path that was typed from the root is recorded from the working directory."""
    return below_here(str(value)) if isinstance(value, (str, Path)) else value


def _date_of_unfinished(options: RunOptions) -> datetime | None:
    """The date that the templates of an unfinished run in the output folder print."""
    metadata = {} if options.overwrite else read_metadata(options.output)
    now = metadata.get("rendering", {}).get("now")
    return datetime.fromisoformat(now) if now and metadata.get("status") in UNFINISHED else None
