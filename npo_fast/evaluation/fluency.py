"""How likely generated answers are under a reference: fluency without a model of its own."""

from dataclasses import replace
from typing import Any

from npo_fast.data import TokenizedExample
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.reference_log_probs import reference_log_probs_of


def generated_columns(
    reference: CausalLM, answers: list[TokenizedExample], records: int, micro_batch_tokens: int
) -> dict[str, Any]:
    """Returns the loss of each generated answer under the reference, and its tokens, as columns.

    Args:
        answers: each with the ``index`` of its record; a record without one has an empty answer.
        records: how many there are.
    """
    placed = [replace(answer, index=i) for i, answer in enumerate(answers)]
    log_probs = reference_log_probs_of(reference, {"answers": placed}, micro_batch_tokens)
    losses, tokens = [0.0] * records, [0] * records
    sums = log_probs["answers"].sequences.tolist()
    for answer, log_prob in zip(answers, sums, strict=True):
        losses[answer.index], tokens[answer.index] = -log_prob, answer.answer_length
    return {"generated_loss": losses, "num_token_generated": tokens}
