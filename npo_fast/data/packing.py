"""Sequences of any length end to end in one row: no padding, and only answer tokens as labels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from npo_fast.data.tokenized import TokenizedExample

_SHARED = ("labels", "answer_cu_seqlens", "indices")  # of all processes that share a batch


@dataclass(frozen=True)
class PackedBatch:
    """S sequences in T tokens, N of which predict an answer token. The label shift is done here.

    Where several processes share a batch, each has the tokens of its own sequences (``examples``
    to ``rows``) and the answers of all of them, process after process.
    """

    examples: tuple[TokenizedExample, ...]  # S, whose tokens stand in the pack
    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (T,) restart at every sequence
    cu_seqlens: Tensor  # (S + 1,) int32, tokens: what attention needs
    rows: Tensor  # (N,) positions whose hidden state predicts an answer token
    labels: Tensor  # (N,) the tokens they predict
    answer_cu_seqlens: Tensor  # (S + 1,) int32, rows: what the loss needs; stays on the CPU
    indices: tuple[int, ...]  # S, row of each sequence in its split
    rows_by_rank: tuple[int, ...] = ()  # rows of each process, where several share the batch
    tokens_by_rank: tuple[int, ...] = ()  # tokens of its sequences whose answers count

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(_lengths(self.examples))

    @property
    def own(self) -> tuple[TokenizedExample, ...]:
        """The examples whose answers count and whose tokens stand in the pack of this process."""
        return self.examples if len(self.rows) or not self.rows_by_rank else ()

    def tokens(self, everywhere: bool) -> tuple[Tensor | slice, Tensor]:
        """Places of the tokens of ``own`` answers, or of all tokens; their offsets, on the CPU."""
        lengths = _lengths(self.own) if everywhere else [e.answer_length for e in self.own]
        places = slice(sum(lengths)) if everywhere else self.rows + 1
        return places, torch.tensor([0, *lengths]).cumsum(0)

    @property
    def sequences(self) -> int:
        """Number of sequences whose answers count."""
        return len(self.indices)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """On ``device``, but for ``answer_cu_seqlens``, which the host reads without waiting."""
        moved = ("input_ids", "position_ids", "cu_seqlens", "rows", "labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})


def pack(
    sequences: Iterable[TokenizedExample], max_tokens: int, group: int = 1
) -> Iterator[PackedBatch]:
    """Batches of whole sequences with at most ``max_tokens`` tokens, in the order given.

    A longer sequence gets a batch of its own. Within a batch, sequences of one length stand
    together, which lets attention take them as one block. ``group`` consecutive sequences (pairs:
    2) stay side by side, in one batch.
    """
    return map(_collate, _split(sequences, max_tokens, group))


def micro_batches(
    sequences: Iterable[TokenizedExample],
    max_tokens: int,
    group: int = 1,
    world_size: int = 1,
    rank: int = 0,
) -> list[PackedBatch]:
    """What goes through the model at a time: the packs of ``pack``, shared by several processes.

    Units of ``group`` sequences are dealt so that each process gets about as many tokens. A process
    that runs out of sequences gets one again, without its answer, so that all make as many passes.
    """
    if world_size == 1:
        return list(pack(sequences, max_tokens, group))
    units = list(_units(sequences, group))
    dealt: list[list[TokenizedExample]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    # the longest first: they even out
    for unit in sorted(units, key=lambda unit: sum(_lengths(unit)), reverse=True):
        least = tokens.index(min(tokens))
        dealt[least] += unit
        tokens[least] += sum(_lengths(unit))
    batches = []
    packs_by_rank = (_split(share, max_tokens, group) for share in dealt)
    for packs in zip_longest(*packs_by_rank, fillvalue=()):
        batch = _collate(packs[rank] or units[0])
        answers = _collate([example for examples in packs for example in examples])
        of_all = {name: getattr(answers, name) for name in _SHARED}
        rows = batch.rows if packs[rank] else batch.rows[:0]
        of_all["rows_by_rank"] = tuple(sum(e.answer_length for e in each) for each in packs)
        of_all["tokens_by_rank"] = tuple(sum(_lengths(each)) for each in packs)
        batches.append(replace(batch, rows=rows, **of_all))
    return batches


def concatenate(packs: Sequence[PackedBatch]) -> PackedBatch:
    """Packs one after another as one, for a single pass through the model."""
    if len(packs) == 1:
        return packs[0]
    examples = [example for batch in packs for example in batch.examples]
    return _collate(examples).to(packs[0].input_ids.device)


def one_by_one(batch: PackedBatch) -> Iterator[PackedBatch]:
    """Each sequence of a pack as a batch of its own, in the same order."""
    for example in batch.examples:
        yield _collate([example]).to(batch.input_ids.device)


def _split(
    sequences: Iterable[TokenizedExample], max_tokens: int, group: int
) -> Iterator[Sequence[TokenizedExample]]:
    """The examples of each batch of ``pack``."""
    batch: list[tuple[TokenizedExample, ...]] = []
    tokens = 0
    for unit in _units(sequences, group):
        length = sum(_lengths(unit))
        if batch and tokens + length > max_tokens:
            yield _flat(batch)
            batch, tokens = [], 0
        batch.append(unit)
        tokens += length
    if batch:
        yield _flat(batch)


def _units(
    sequences: Iterable[TokenizedExample], group: int
) -> Iterator[tuple[TokenizedExample, ...]]:
    return zip(*[iter(sequences)] * group, strict=True)


def _flat(units: list[tuple[TokenizedExample, ...]]) -> list[TokenizedExample]:
    """All examples, those of one length side by side."""
    return [example for unit in sorted(units, key=_lengths) for example in unit]


def _lengths(examples: Iterable[TokenizedExample]) -> list[int]:
    return [len(example.input_ids) for example in examples]


def _collate(examples: Sequence[TokenizedExample]) -> PackedBatch:
    input_ids: list[int] = []
    position_ids: list[int] = []
    rows: list[int] = []
    labels: list[int] = []
    cu_seqlens, answer_cu_seqlens = [0], [0]
    for example in examples:
        start, ids = len(input_ids), example.input_ids
        input_ids += ids
        position_ids += range(len(ids))
        rows += range(start + example.prompt_length - 1, start + len(ids) - 1)
        labels += ids[example.prompt_length :]
        cu_seqlens.append(len(input_ids))
        answer_cu_seqlens.append(len(rows))
    return PackedBatch(
        examples=tuple(examples),
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        rows=torch.tensor(rows),
        labels=torch.tensor(labels),
        answer_cu_seqlens=torch.tensor(answer_cu_seqlens, dtype=torch.int32),
        indices=tuple(example.index for example in examples),
    )
