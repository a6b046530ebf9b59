"""What a run compares with: log-probs and hidden states under the model as it is, or another one.

Another model is loaded, asked and freed before the model that trains is loaded: two are never in
memory together.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from npo_fast.data import Template, TokenizedExample, check_readable
from npo_fast.errors import UserError, named
from npo_fast.methods import Term
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.load import load_config
from npo_fast.model.model_files import check_weights, files_fingerprint
from npo_fast.model.reference_log_probs import ReferenceLogProbs, reference_log_probs_of
from npo_fast.model.reference_states import ReferenceStates
from npo_fast.runs.models import Model, ModelSource
from npo_fast.runs.options import MethodOptions
from npo_fast.runs.preparing import PreparedRun
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs
from npo_fast.trainer.step import References, layer_of

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
    if resumable and (resumable.references or resumable.trained):
        log_probs: References = dict(resumable.references or {})
    else:
        if any(term.loss.reference for term in terms):
            logger.info("running the model on the data as it is: the method compares with that")
        log_probs = reference_log_probs(lm, sources, terms, tokens, cache, also)
    return log_probs, reference_cache_for(terms, lm, sources, tokens, cache)


def reference_model(reference: str | None, prepared: PreparedRun) -> str | None:
    """The model that ``--reference`` names; None where it is the run's own.

    None too where a resumed run kept all that the model would tell.

    Raises:
        UserError: the model before the first request is not where it was, or another one cannot
            be the reference.
    """
    first = prepared.chain.first
    if reference is None or (reference == FIRST and first is None):
        return None
    kept = prepared.resumable and (prepared.resumable.references or prepared.resumable.trained)
    if kept and not any(term.loss.reference == "hidden" for term in prepared.terms):
        return None
    if first is None or reference != FIRST:
        other_model(reference, prepared.model, prepared.template, _compared(prepared))
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
    compared = _compared(prepared)
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


def _compared(prepared: PreparedRun) -> dict[str, list[TokenizedExample]]:
    """The data of every term."""
    needed: set[str] = {source for term in prepared.terms for source in term.reads}
    return {source: prepared.sources[source] for source in needed}


def other_model(
    model: Model,
    like: ModelSource,
    template: Template,
    sources: Mapping[str, list[TokenizedExample]],
    role: str = "reference",
) -> ModelSource:
    """Another model, to which the tokens of ``sources`` mean the same; no weight is loaded.

    Args:
        like: the run's model, whose dtype, device and attention it takes.
        template: of the run's model, which made the tokens.
        role: the flag that named it, without dashes.

    Raises:
        UserError: there is no such model, its files are not whole, or its vocabulary is another.
    """
    options = replace(like.options, model="", lora_rank=0, lora_alpha=None)
    other = ModelSource(model, options, role=role)
    if other.in_memory is None:
        with named(f"--{role}"):
            load_config(other.name)
            check_weights(other.name)
    _check_tokens(other, template, sources, role)
    return other


def load_other(
    model: Model,
    like: ModelSource,
    template: Template,
    sources: Mapping[str, list[TokenizedExample]],
    role: str = "reference",
) -> CausalLM:
    """``other_model`` with its weights."""
    lm = other_model(model, like, template, sources, role).load()
    check_readable(sources, lm.vocabulary, lm.positions)
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
    answers, on the CPU. The arguments are those of ``other_model``; ``cache`` as a
    ``--reference-cache``.
    """
    with other_model(model, like, template, sources, role).loaded() as lm:
        check_readable(sources, lm.vocabulary, lm.positions)
        return reference_log_probs_of(lm, sources, micro_batch_tokens, cache)


def check_head(states: ReferenceStates | None, lm: CausalLM, terms: Sequence[Term] = ()) -> None:
    """Raises ``UserError`` where the model has other tokens, or another layer, than the states."""
    if states is None:
        return
    if "layer" in states.made_from:
        compared = [term for term in terms if term.loss.reference == "hidden"]
        width = lm.model.config.get_text_config().hidden_size
        here = (layer_of(lm, compared), width)
        there = (states.made_from["layer"], states.hidden(compared[0].source, [0]).shape[-1])
        if here != there:
            raise UserError(
                "--reference hands on states of layer {}, {} wide, and the model of layer {}, {} "
                "wide: name a model of the same form".format(*there, *here)
            )
        return
    if states.head.tokens != len(lm.head.weight):
        raise UserError(
            f"--reference predicts {states.head.tokens} tokens and the model "
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
