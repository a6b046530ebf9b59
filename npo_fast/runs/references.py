"""What a run compares with: log-probs and hidden states under the model as it is, or another one.

Another model is loaded, asked and freed before the model that trains is loaded: two are never in
memory together.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from npo_fast.data import Template, TokenizedExample, check_vocabulary
from npo_fast.distributed import world_size
from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.reference_log_probs import ReferenceLogProbs, reference_log_probs_of
from npo_fast.runs.models import Model, ModelSource
from npo_fast.runs.preparing import PreparedRun
from npo_fast.trainer.loop import reference_log_probs
from npo_fast.trainer.step import References


def run_log_probs(lm: CausalLM, prepared: PreparedRun, cache: Path | None) -> References:
    """The reference's log-probs: kept by a resumed run, else of the model as it is now."""
    resumable, terms = prepared.resumable, prepared.terms
    if resumable and (resumable.references or resumable.trained):
        return dict(resumable.references or {})
    compares = any(term.loss.reference in ("sequence", "token") for term in terms)
    if resumable and world_size() > 1 and compares:
        raise UserError(  # sharded models have the weights of the checkpoint by now
            f"the reference's log-probs in {resumable.folder} are lost: go on with one process, "
            "which makes them again"
        )
    tokens = prepared.training.micro_batch_tokens
    return reference_log_probs(lm, prepared.sources, terms, tokens, cache)


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
