"""Sequences of any length end to end in one row: no padding, and only answer tokens as labels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from npo_fast.data.template import TokenizedExample


@dataclass(frozen=True)
class PackedBatch:
    """S sequences in T tokens, N of which predict an answer token. The label shift is done here.

    Where several processes share a batch, each has the tokens of its own sequences (``input_ids``
    to ``lengths``, and ``rows``) and the answers of all of them, process after process.
    """

    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (T,) restart at every sequence
    cu_seqlens: Tensor  # (S + 1,) int32, tokens: what attention needs
    lengths: tuple[int, ...]  # S, tokens of each sequence
    rows: Tensor  # (N,) positions whose hidden state predicts an answer token
    labels: Tensor  # (N,) the tokens they predict
    answer_cu_seqlens: Tensor  # (S + 1,) int32, rows: what the loss needs; stays on the CPU
    indices: tuple[int, ...]  # S, row of each sequence in its split
    rows_by_rank: tuple[int, ...] = ()  # rows of each process, where several share the batch

    @property
    def sequences(self) -> int:
        """Number of sequences whose answers count."""
        return len(self.indices)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """On ``device``, but for ``answer_cu_seqlens``: the host reads it without synchronising."""
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
    batch: list[tuple[TokenizedExample, ...]] = []
    tokens = 0
    for unit in zip(*[iter(sequences)] * group, strict=True):
        length = _tokens(unit)
        if batch and tokens + length > max_tokens:
            yield _collate(batch)
            batch, tokens = [], 0
        batch.append(unit)
        tokens += length
    if batch:
        yield _collate(batch)


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
    units = list(zip(*[iter(sequences)] * group, strict=True))
    dealt: list[list[TokenizedExample]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for unit in sorted(units, key=_tokens, reverse=True):  # the longest first: they even out
        least = tokens.index(min(tokens))
        dealt[least] += unit
        tokens[least] += _tokens(unit)
    packs_by_rank = [list(pack(share, max_tokens, group)) for share in dealt]
    passes = max(map(len, packs_by_rank))
    for packs in packs_by_rank:
        packs += [_without_answers(units[0])] * (passes - len(packs))
    return [_share_answers(packs, rank) for packs in zip(*packs_by_rank, strict=True)]


def _tokens(unit: tuple[TokenizedExample, ...]) -> int:
    return sum(len(sequence.input_ids) for sequence in unit)


def _without_answers(unit: tuple[TokenizedExample, ...]) -> PackedBatch:
    batch = _collate([unit])
    return replace(
        batch,
        rows=batch.rows[:0],
        labels=batch.labels[:0],
        answer_cu_seqlens=batch.answer_cu_seqlens[:1],
        indices=(),
    )


def _share_answers(packs: Sequence[PackedBatch], rank: int) -> PackedBatch:
    """The tokens of the pack of ``rank``, with the answers of all packs."""
    answers = concatenate(packs)
    return replace(
        packs[rank],
        labels=answers.labels,
        answer_cu_seqlens=answers.answer_cu_seqlens,
        indices=answers.indices,
        rows_by_rank=tuple(len(p.rows) for p in packs),
    )


def concatenate(packs: Sequence[PackedBatch]) -> PackedBatch:
    """Packs one after another as one, for a single pass through the model."""
    if len(packs) == 1:
        return packs[0]
    tokens = list(accumulate((len(p.input_ids) for p in packs), initial=0))
    answers = list(accumulate((len(p.labels) for p in packs), initial=0))

    def offsets(name: str, starts: list[int]) -> Tensor:
        parts = [getattr(p, name)[1:] + start for p, start in zip(packs, starts, strict=False)]
        return torch.cat([getattr(packs[0], name)[:1], *parts])

    return PackedBatch(
        input_ids=torch.cat([p.input_ids for p in packs]),
        position_ids=torch.cat([p.position_ids for p in packs]),
        cu_seqlens=offsets("cu_seqlens", tokens),
        rows=torch.cat([p.rows + start for p, start in zip(packs, tokens, strict=False)]),
        labels=torch.cat([p.labels for p in packs]),
        answer_cu_seqlens=offsets("answer_cu_seqlens", answers),
        lengths=tuple(length for p in packs for length in p.lengths),
        indices=tuple(index for p in packs for index in p.indices),
    )


def _collate(units: list[tuple[TokenizedExample, ...]]) -> PackedBatch:
    units = sorted(units, key=lambda unit: [len(sequence.input_ids) for sequence in unit])
    sequences = [sequence for unit in units for sequence in unit]
    input_ids: list[int] = []
    position_ids: list[int] = []
    rows: list[int] = []
    labels: list[int] = []
    cu_seqlens, answer_cu_seqlens = [0], [0]
    for sequence in sequences:
        start, ids = len(input_ids), sequence.input_ids
        input_ids += ids
        position_ids += range(len(ids))
        rows += range(start + sequence.prompt_length - 1, start + len(ids) - 1)
        labels += ids[sequence.prompt_length :]
        cu_seqlens.append(len(input_ids))
        answer_cu_seqlens.append(len(rows))
    return PackedBatch(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        rows=torch.tensor(rows),
        labels=torch.tensor(labels),
        answer_cu_seqlens=torch.tensor(answer_cu_seqlens, dtype=torch.int32),
        lengths=tuple(len(sequence.input_ids) for sequence in sequences),
        indices=tuple(sequence.index for sequence in sequences),
    )


def one_by_one(batch: PackedBatch) -> Iterator[PackedBatch]:
    """Each sequence of a pack as a batch of its own, in the same order."""
    ids = batch.input_ids.split(batch.lengths)
    answers = batch.answer_cu_seqlens.diff().tolist()
    labels = batch.labels.split(answers)
    for i, length in enumerate(batch.lengths):
        rows = torch.arange(length - 1 - answers[i], length - 1, device=batch.rows.device)
        yield PackedBatch(
            input_ids=ids[i],
            position_ids=torch.arange(length, device=batch.position_ids.device),
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32, device=batch.cu_seqlens.device),
            rows=rows,
            labels=labels[i],
            answer_cu_seqlens=torch.tensor([0, answers[i]], dtype=torch.int32),
            lengths=(length,),
            indices=(batch.indices[i],),
        )
