"""What a KL over answer tokens weighs beside one over every position of padded batches."""

from dataclasses import replace

from npo_fast.data import Sources
from npo_fast.losses import KL
from npo_fast.methods import Term
from npo_fast.trainer.order import primary_sources, step_batches
from npo_fast.trainer.settings import TrainSettings

PAPER_LENGTH = 500  # of every sequence in the NPO paper's code, padding included


def padded_weights(terms: tuple[Term, ...], sources: Sources, settings: TrainSettings) -> list[str]:
    """A line for each KL: by how much less its tokens weigh in other code, and the coefficient.

    Other code divides the KL of a batch by all of its positions, prompts and padding among them,
    and so weighs a token less by ``positions / tokens counted here``. That is taken over an epoch.
    """
    sources = {name: sources[name] for term in terms for name in term.reads}
    return [
        _line(term, *_lengths(term, sources, settings))
        for term in terms
        if isinstance(term.loss, KL)
    ]


def _line(term: Term, counted: int, to_longest: int, to_500: int) -> str:
    assert isinstance(term.loss, KL)
    over = "answer tokens" if term.positions == "answer" else "tokens, prompts among them"
    ways = {f"padded to {PAPER_LENGTH} (the NPO paper's code)": to_500 / counted}
    flag = "--kl-coefficient"
    if term.loss.demotion:  # UNDIAL, which that code does not have
        ways, flag = {}, "--forget-coefficient"
    ways = {"padded to their longest (open-unlearning)": to_longest / counted, **ways}
    weighs = ", ".join(f"{way} {factor:.3g} times less" for way, factor in ways.items())
    coefficients = " or ".join(f"{abs(term.coefficient) / factor:.3g}" for factor in ways.values())
    return (
        f"{term.name}: a mean over {over}. In a mean over all positions of batches a token weighs, "
        f"{weighs}: as much as with {flag} {coefficients}"
    )


def _lengths(term: Term, sources: Sources, settings: TrainSettings) -> tuple[int, int, int]:
    """Tokens counted here, and positions padded to the longest of a batch and to 500."""
    counted = to_longest = to_500 = 0
    epoch = replace(settings, epochs=1, last_batch="keep")
    for batch in step_batches(sources, primary_sources(sources), epoch):
        examples = batch[term.source]
        lengths = [len(example.input_ids) for example in examples]
        everywhere = term.positions == "all"
        counted += sum(lengths if everywhere else (example.answer_length for example in examples))
        to_longest += len(lengths) * max(lengths)
        to_500 += len(lengths) * max(PAPER_LENGTH, *lengths)
    return counted, to_longest, to_500
