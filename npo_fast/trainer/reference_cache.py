"""Which reference states the terms of a method need."""

from collections.abc import Mapping
from pathlib import Path

from npo_fast.data import TokenizedExample
from npo_fast.losses import KL
from npo_fast.methods import Term
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.reference_states import ReferenceStates, open_reference_states


def reference_cache_for(
    terms: tuple[Term, ...],
    lm: CausalLM,
    sources: Mapping[str, list[TokenizedExample]],
    micro_batch_tokens: int,
    folder: Path | None = None,
) -> ReferenceStates | None:
    """Returns the ``open_reference_states`` of the terms with a KL, or None where none has one."""
    kl_terms = [term for term in terms if isinstance(term.loss, KL)]
    if not kl_terms:
        return None
    (positions,) = {term.positions for term in kl_terms}
    compared: dict[str, list[TokenizedExample]] = {
        term.source: sources[term.source] for term in kl_terms
    }
    return open_reference_states(lm, compared, folder, positions, micro_batch_tokens)
