"""What a run compares with: log-probs and hidden states under the model as it is, or another one.

Another model is loaded, asked and freed before the model that trains is loaded: two are never in
memory together.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from npo_fast.data import Template, TokenizedExample, check_vocabulary
from npo_fast.distributed import world_size
from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.load import files_fingerprint
from npo_fast.model.reference_log_probs import ReferenceLogProbs, reference_log_probs_of
from npo_fast.model.reference_states import ReferenceStates
from npo_fast.runs.models import Model, ModelSource
from npo_fast.runs.options import MethodOptions
from npo_fast.runs.preparing import PreparedRun
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs
from npo_fast.trainer.step import References

FIRST = "first"
_CURE = "Name where it is now, or another model, with --reference MODEL"
logger = logging.getLogger(__name__)


def run_references(
    lm: CausalLM, prepared: PreparedRun, cache: Path | None
) -> tuple[References, ReferenceStates | None]:
    """Log-probs and hidden states of ``lm`` that the terms compare with.

    The log-probs are those that a resumed run kept, else of ``lm`` as it is now.
    """
    sources, terms = prepared.sources, prepared.terms
    tokens, resumable = prepared.training.micro_batch_tokens, prepared.resumable
    also = () if prepared.training.keep_utility is None else ("retain",)
    compares = also or any(term.loss.reference in ("sequence", "token") for term in terms)
    if resumable and (resumable.references or resumable.trained):
        log_probs: References = dict(resumable.references or {})
    elif resumable and world_size() > 1 and compares:
        raise UserError(  # sharded models have the weights of the checkpoint by now
            f"the reference's log-probs in {resumable.folder} are lost: go on with one process, "
            "which makes them again"
        )
    else:
        log_probs = reference_log_probs(lm, sources, terms, tokens, cache, also)
    return log_probs, reference_cache_for(terms, lm, sources, tokens, cache)


def reference_model(reference: str | None, prepared: PreparedRun) -> str | None:
    """The model that ``--reference`` names; None where it is the run's own.

    None too where a resumed run kept all that the model would tell.

    Raises:
        UserError: the model before the first request is not where it was.
    """
    first = prepared.chain.first
    if reference is None or (reference == FIRST and first is None):
        return None
    kept = prepared.resumable and (prepared.resumable.references or prepared.resumable.trained)
    if kept and not any(term.loss.reference == "hidden" for term in prepared.terms):
        return None
    if world_size() > 1:
        raise UserError(f"--reference runs on one process, not on {world_size()}")
    if first is None or reference != FIRST:
        return reference
    name: str = first["model"]
    is_path = name.startswith(".") or Path(name).is_absolute()
    if first["sha256"] is None or (is_path and not Path(name).exists()):
        raise UserError(
            f"--reference first: the model before the first request was {name!r}, which is not "
            f"there. {_CURE}"
        )
    return name


def references_under(
    name: str, prepared: PreparedRun, method: MethodOptions
) -> tuple[References, ReferenceStates | None]:
    """``run_references`` of the model ``name``, which is freed again.

    Raises:
        UserError: ``--reference first`` is another model than the chain began with.
    """
    needed: set[str] = {source for term in prepared.terms for source in term.reads}
    compared = {source: prepared.sources[source] for source in needed}
    lm = load_other(name, prepared.model, prepared.template, compared)
    first = prepared.chain.first
    is_first = first is not None and files_fingerprint(name) == first["sha256"]
    if method.reference == FIRST and not is_first:
        raise UserError(
            f"--reference first: {name!r} is no longer the model that the first request began "
            f"with (its files have changed). {_CURE}"
        )
    which = ", the model before the first request" if is_first else ""
    logger.info(f"the reference is {name}{which}")
    return run_references(lm, prepared, method.reference_cache)


def load_other(
    model: Model,
    like: ModelSource,
    template: Template,
    sources: Mapping[str, list[TokenizedExample]],
    role: str = "reference",
) -> CausalLM:
    """Another model, to which the tokens of ``sources`` mean the same.

    Args:
        like: the run's model, whose dtype, device and attention it takes.
        template: of the run's model, which made the tokens.
        role: the flag that named it, without dashes.

    Raises:
        UserError: it has another vocabulary, or cannot be loaded.
    """
    options = replace(like.options, model="", lora_rank=0, lora_alpha=None)
    other = ModelSource(model, options, role=role)
    _check_tokens(other, template, sources, role)
    lm = other.load()
    check_vocabulary(sources, lm.vocabulary)
    return lm


def log_probs_under(
    model: Model,
    like: ModelSource,
    template: Template,
    sources: Mapping[str, list[TokenizedExample]],
    micro_batch_tokens: int,
    cache: Path | None = None,
    role: str = "reference",
) -> dict[str, ReferenceLogProbs]:
    """Log-probs of the answers of each source under another model, which is freed again.

    Call it before the run's model is loaded. ``[source].sequences`` are the S log-probs of whole
    answers, on the CPU. The arguments are those of ``load_other``; ``cache`` as a
    ``--reference-cache``.
    """
    lm = load_other(model, like, template, sources, role)
    return reference_log_probs_of(lm, sources, micro_batch_tokens, cache)


def check_head(states: ReferenceStates | None, lm: CausalLM) -> None:
    """Raises ``UserError`` where the reference predicts other tokens than the model."""
    if states is None or "layer" in states.made_from:
        return
    if len(states.head.weight) != len(lm.head.weight):
        raise UserError(
            f"--reference predicts {len(states.head.weight)} tokens and the model "
            f"{len(lm.head.weight)}: KL compares models with the same tokens"
        )


def _check_tokens(
    other: ModelSource,
    template: Template,
    sources: Mapping[str, list[TokenizedExample]],
    role: str,
) -> None:
    """Checks that the tokens mean the same to both models, as far as the other one can tell."""
    try:
        tokenizer = other.template().tokenizer
    except UserError:
        return  # a folder with weights alone
    used = sorted({i for each in sources.values() for example in each for i in example.input_ids})
    ours, theirs = (t.convert_ids_to_tokens(used) for t in (template.tokenizer, tokenizer))
    for token, expected, actual in zip(used, ours, theirs, strict=True):
        if expected != actual:
            raise UserError(
                f"--{role} {other.options.model} has another vocabulary than the model: its token "
                f"{token} is {actual!r}, not {expected!r}; name a model with the same tokens"
            )
