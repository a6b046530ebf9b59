"""Which sequences each step sees: a function of the seed alone, so a run can be repeated."""

import math
import sys
from collections.abc import Iterable, Iterator
from itertools import count

import torch

from npo_fast.data import Sources, TokenizedExample, micro_batches
from npo_fast.errors import UserError
from npo_fast.methods import Term, schedule_steps
from npo_fast.trainer.settings import TrainSettings

BatchKey = tuple[str, ...]  # the sources whose sequences alternate in a micro-batch


def step_count(examples: int, settings: TrainSettings) -> int:
    """Batches of the whole run, where an epoch passes over so many ``examples``.

    Raises:
        UserError: none, since fewer examples than a batch are dropped.
    """
    size, epochs = settings.batch_size, settings.epochs
    batches = {
        "keep": epochs * math.ceil(examples / size),
        "drop": epochs * (examples // size),
        "carry": epochs * examples // size,
    }[settings.last_batch]
    if not batches:
        raise UserError(
            f"--last-batch {settings.last_batch} leaves no batch of {size} among {examples} "
            f"sequences: lower --batch-size, or use --last-batch keep"
        )
    return batches


def primary_sources(sources: Sources) -> tuple[str, ...]:
    """The sources that an epoch passes over: all but the retain data, which may be alone.

    Raises:
        UserError: they differ in length, so they are not answers to the same questions.
    """
    primary = tuple(name for name in sources if name != "retain") or tuple(sources)
    lengths = {name: len(sources[name]) for name in primary}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{length} in {name}" for name, length in lengths.items())
        raise UserError(f"each forget question needs one answer of every kind, got {shown}")
    return primary


def step_batches(
    sources: Sources, primary: tuple[str, ...], settings: TrainSettings
) -> Iterator[dict[str, list[TokenizedExample]]]:
    """The sequences of each step, by source; ``last_batch`` says what becomes of an epoch's rest.

    The primary sources hold answers to the same questions, and a step sees the same questions of
    each. Of the other sources a step sees as many sequences, none again before all were seen.
    """
    others = {
        name: _endless(sequences, f"{settings.seed}/{name}")
        for name, sequences in sources.items()
        if name not in primary
    }
    for places in _places(len(sources[primary[0]]), f"{settings.seed}/{primary[0]}", settings):
        batch = {name: [sources[name][i] for i in places] for name in primary}
        for name, examples in others.items():
            batch[name] = [next(examples) for _ in places]
        yield batch


def _places(questions: int, key: str, settings: TrainSettings) -> Iterator[list[int]]:
    """The questions of each batch, epoch after epoch."""
    rest: list[int] = []
    for epoch in range(settings.epochs):
        order = rest + permutation(questions, f"{key}/{epoch}")
        whole = len(order) - len(order) % settings.batch_size
        for first in range(0, whole, settings.batch_size):
            yield order[first : first + settings.batch_size]
        rest = order[whole:] if settings.last_batch == "carry" else []
        if settings.last_batch == "keep" and whole < len(order):
            yield order[whole:]


def interleave(batch: Sources, batch_key: Iterable[str]) -> list[TokenizedExample]:
    """The first sequence of each source, then the second of each, and so on: pairs side by side."""
    units = zip(*(batch[name] for name in batch_key), strict=True)
    return [sequence for unit in units for sequence in unit]


def batch_keys(terms: Iterable[Term]) -> list[BatchKey]:
    """The different batch keys of these terms: terms of one key share their micro-batches."""
    return list(dict.fromkeys(term.batch_key for term in terms))


def check_step_in_backward(
    sources: Sources, terms: tuple[Term, ...], settings: TrainSettings, world_size: int = 1
) -> None:
    """Raises ``UserError`` where a process has more tokens of a step than a micro-batch may."""
    sources = {name: sources[name] for term in terms for name in term.reads}
    batches = step_batches(sources, primary_sources(sources), settings)
    keys_of_steps = [batch_keys(step) for step in schedule_steps(terms, settings.schedule)]
    tokens = max(
        sum(_most_tokens(batch, key, world_size) for key in keys)
        for batch in batches
        for keys in keys_of_steps
    )
    if tokens > settings.micro_batch_tokens:
        raise UserError(
            f"--step-in-backward takes a whole step at once, and the largest has {tokens} tokens "
            f"(micro_batch_tokens is {settings.micro_batch_tokens}): add --micro-batch-tokens "
            f"{tokens}, with --gradient-checkpointing where memory is short, or lower --batch-size"
        )


def _most_tokens(batch: Sources, key: BatchKey, world_size: int) -> int:
    """Tokens of the process with most of them, where a step is one micro-batch."""
    sequences = interleave(batch, key)
    (whole,) = micro_batches(sequences, sys.maxsize, len(key), world_size)
    return max(whole.tokens_by_rank or [len(whole.input_ids)])


def _endless(sequences: list[TokenizedExample], key: str) -> Iterator[TokenizedExample]:
    for round_ in count():
        for i in permutation(len(sequences), f"{key}/{round_}"):
            yield sequences[i]


def permutation(length: int, key: str) -> list[int]:
    """The numbers below ``length`` in an order that ``key`` alone decides."""
    seed = int.from_bytes(key.encode(), "little") % (2**63 - 25)
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
