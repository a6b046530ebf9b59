"""Which sequences each step sees: a function of the seed alone, so a run can be repeated."""

import math
from collections.abc import Iterator, Mapping

import torch

from npo_fast.data import Sequence


def steps_per_epoch(examples: int, batch_size: int) -> int:
    return math.ceil(examples / batch_size)


def step_batches(
    sources: Mapping[str, list[Sequence]], driving: str, batch_size: int, epochs: int, seed: int
) -> Iterator[dict[str, list[Sequence]]]:
    """One dict of sequences a step; the last step of an epoch may be smaller."""
    others = {
        name: _endless(sequences, f"{seed}/{name}")
        for name, sequences in sources.items()
        if name != driving
    }
    examples = sources[driving]
    for epoch in range(epochs):
        order = permutation(len(examples), f"{seed}/{driving}/{epoch}")
        for first in range(0, len(examples), batch_size):
            batch = {driving: [examples[i] for i in order[first : first + batch_size]]}
            for name, stream in others.items():
                batch[name] = [next(stream) for _ in batch[driving]]
            yield batch


def _endless(sequences: list[Sequence], key: str) -> Iterator[Sequence]:
    round_ = 0
    while True:
        for i in permutation(len(sequences), f"{key}/{round_}"):
            yield sequences[i]
        round_ += 1


def permutation(length: int, key: str) -> list[int]:
    seed = int.from_bytes(key.encode(), "little") % (2**63 - 25)
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
