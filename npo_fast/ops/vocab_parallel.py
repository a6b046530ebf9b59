"""A head, and an embedding, whose rows lie in slices on several processes (ranks).

Each rank makes the logits of its slice alone. Two numbers a row go around: the logsumexp o_n over
the slice without the label, and the label's logit where the slice has it.

    l_n = -log(1 + exp(logsumexp over ranks of o_n - z_n[y_n])),    lse_n = z_n[y_n] - l_n

(The label stays apart so that l_n keeps its digits where the model is sure of it.)

The row kernel normalises over the slice; ``exp(lse_n(slice) - lse_n)``, one number a row, is what
its share lacks. All ranks then know every log-prob, evaluate the same loss, and hold the
gradient of their own slice. The gradient of ``hidden`` is a sum over ranks, which the backward of
``gather_rows`` takes on its way back to those whose rows they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from npo_fast.distributed import all_reduce_max, rows_of
from npo_fast.errors import UserError
from npo_fast.kernels.layout import opmath_dtype, pad_rows
from npo_fast.kernels.transform import HeadTransform
from npo_fast.ops.cost import Problem
from npo_fast.ops.derivatives import check_derivatives, first_derivative
from npo_fast.ops.head import Head, Softmax
from npo_fast.ops.linear_log_probs import split_rows

# newer names since PyTorch 2.13, which warns of the older ones
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Rows whose two numbers go around at once. Over links, the numbers of 16 or more ranks take as long
# as some of the product; what is left uncovered is the last piece's.
PIECE_ROWS = 4096


@dataclass(frozen=True)
class VocabularySlice:
    """Rows ``[first, first + rows)`` of V; as ``torch.chunk`` cuts, so the last may be fewer."""

    group: dist.ProcessGroup
    vocabulary: int  # V

    @property
    def world_size(self) -> int:
        """Ranks that share the vocabulary."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """The position of this process in ``group``."""
        return self.group.rank()

    @property
    def most_rows(self) -> int:
        """Rows of the largest slice."""
        return -(-self.vocabulary // self.world_size)

    @property
    def first(self) -> int:
        """The token that the first row of this slice belongs to."""
        return rows_of(self.vocabulary, self.rank, self.world_size)[0]

    @property
    def rows(self) -> int:
        """Rows of this slice."""
        return rows_of(self.vocabulary, self.rank, self.world_size)[1]

    def longest(self, values: Tensor) -> int:
        """Returns the length of the rank that has most; of tensors without data all have one."""
        if values.is_meta:
            return len(values)
        return all_reduce_max(len(values), values.device, self.group)

    def localize(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ids counted from ``first``, clamped to the slice, and which of them it has."""
        local = ids - self.first
        return local.clamp(0, self.rows - 1), (local >= 0) & (local < self.rows)


@dataclass(frozen=True)
class SlicedHead(Head):
    """A ``Head`` whose weight and bias are those of ``vocabulary``'s slice."""

    vocabulary: VocabularySlice = field(kw_only=True)

    @property
    def tokens(self) -> int:
        """Tokens that the heads of all ranks predict, V."""
        return self.vocabulary.vocabulary

    def problem(self, rows: int, trains_head: bool) -> Problem:
        """Returns the sizes of the largest slice, so that all ranks take the same chunks."""
        largest = super().problem(rows, trains_head)
        # the operators without logits do not know of slices
        return replace(largest, vocabulary=self.vocabulary.most_rows, makes_logits=True)

    def log_probs(self, hidden: Tensor, labels: Tensor) -> Tensor:  # (N, D), (N,) -> (N,)
        """Returns log-probs over the whole vocabulary, equal on all ranks."""
        column, mine = self.vocabulary.localize(labels)
        begun = []
        for rows in _pieces(len(hidden)):
            log_probs, lse = torch.ops.npo_fast.linear_log_probs(
                hidden[rows], self.weight, column[rows], self.bias, *self.transform
            )
            begun.append(self._begin_combining(log_probs, lse, mine[rows]))
        return torch.cat([wait()[0] for wait in begun])

    def logits_and_softmax(
        self, hidden: Tensor, labels: Tensor, buffer: Tensor
    ) -> tuple[Tensor, Softmax]:  # (R, D), (R,), (padded R or more, rows) -> (padded R, rows)
        """Raw logits of this slice, normalised over the whole vocabulary.

        The numbers of a piece of rows go around while the logits of the next one are made.
        """
        begun = []
        for rows in _pieces(len(hidden)):
            logits = self.logits(hidden[rows], buffer[rows.start :])
            column, mine = self.vocabulary.localize(pad_rows(labels[rows], len(logits)))
            local = self._softmax(logits, hidden[rows], column[: rows.stop - rows.start])
            wait = self._begin_combining(local.log_probs, local.lse, mine)
            begun.append((local._replace(labels=torch.where(mine, column, -1)), wait))
        parts = []
        for local, wait in begun:
            log_probs, lse = wait()
            share = local.share * torch.exp(local.lse - lse)
            parts.append(local._replace(log_probs=log_probs, lse=lse, share=share))
        return buffer[: self.padded(len(hidden))], Softmax(
            *map(torch.cat, zip(*parts, strict=True))
        )

    def localize(self, labels: Tensor) -> tuple[Tensor, Tensor]:  # (R,) each
        """Returns columns within the slice, and which labels it has."""
        return self.vocabulary.localize(labels)

    def argmax(self, logits: Tensor) -> Tensor:  # (R, rows) -> (R,)
        """Returns the token with the largest logit of all slices; of equal ones the first."""
        largest, column = logits.max(dim=-1)
        group = self.vocabulary.group
        values = _all_gather(largest[None], 1, group)[:, 0]  # (ranks, R)
        tokens = _all_gather((column + self.vocabulary.first)[None], 1, group)[:, 0]
        return tokens.gather(0, values.argmax(dim=0)[None])[0]

    def log_softmax(self, logits: Tensor) -> Tensor:  # (R, rows) raw -> (R, rows)
        """Returns the log-probs of the slice's tokens."""
        lse = self.begin_lse(logits, self.transform)()
        return self.activate(logits).sub_(lse.unsqueeze(1))

    def begin_lse(
        self, logits: Tensor, transform: HeadTransform
    ) -> Callable[[], Tensor]:  # (R, rows) raw -> (R,)
        """Returns what waits for the logsumexp over the whole vocabulary."""
        any_label = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        _, lse, *_ = torch.ops.npo_fast.row_log_probs(logits, any_label, None, *transform)
        wait = _begin_all_gather(lse[None], 1, self.vocabulary.group)
        return lambda: wait()[:, 0].logsumexp(dim=0)

    def sum_over_ranks(self, values: Tensor) -> Tensor:  # (R,), overwritten
        """Returns the sum over the slices of all ranks."""
        dist.all_reduce(values, group=self.vocabulary.group)
        return values

    def combine_means(self, lse: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:  # (R,), (R,)
        """Returns logsumexp, and mean under the softmax, over the slices of all ranks."""
        gathered = _all_gather(torch.stack([lse, mean]), 2, self.vocabulary.group)
        over_all = gathered[:, 0].logsumexp(dim=0)
        return over_all, (torch.exp(gathered[:, 0] - over_all) * gathered[:, 1]).sum(dim=0)

    def _begin_combining(
        self,
        log_probs: Tensor,  # (R,) within the slice, of the label where that has it
        lse: Tensor,  # (R,) over the slice
        mine: Tensor,  # (R,) whether the slice has the label
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Returns what waits for log_probs and lse over the whole vocabulary."""
        without_label = lse + torch.log(-torch.expm1(log_probs.clamp(max=0.0)))
        local = torch.stack(
            [torch.where(mine, without_label, lse), torch.where(mine, log_probs + lse, 0.0)]
        )
        wait = _begin_all_gather(local, len(local), self.vocabulary.group)

        def combine() -> tuple[Tensor, Tensor]:
            gathered = wait()
            others, z = gathered[:, 0].logsumexp(dim=0), gathered[:, 1].sum(dim=0)
            log_probs = -torch.nn.functional.softplus(others - z)
            # the label may be masked
            return log_probs, torch.where(z == -torch.inf, others, z - log_probs)

        return combine


def _pieces(count: int) -> list[slice]:
    """Cuts rows; the numbers of each piece go around during the next piece's product."""
    return split_rows(slice(0, count), PIECE_ROWS) or [slice(0, 0)]


def check_slice(op: str, vocabulary: VocabularySlice, weight: Tensor) -> None:
    """Raises UserError unless ``weight`` has the rows of this rank's slice."""
    if len(weight) != vocabulary.rows or not vocabulary.rows:
        raise UserError(
            f"{op}: rank {vocabulary.rank} of {vocabulary.world_size} has {vocabulary.rows} rows "
            f"of a vocabulary of {vocabulary.vocabulary}, got weight {tuple(weight.shape)}"
        )


def local_head(
    weight: Tensor,  # (V, D), or the rows of a slice
    bias: Tensor | None,
    transform: HeadTransform,
    vocabulary: VocabularySlice | None,
) -> Head:
    """Returns the head, or this rank's slice of it."""
    if vocabulary is None:
        return Head(weight, bias, transform)
    return SlicedHead(weight, bias, transform, vocabulary=vocabulary)


def gather_rows(
    rows: Tensor,  # (counts[rank], D)
    counts: Sequence[int],
    group: dist.ProcessGroup,
) -> Tensor:  # (sum(counts), D)
    """Returns the rows of all ranks, in the order of ranks; gradients are summed over ranks."""
    check_derivatives("gather_rows", rows)
    if len(rows) != counts[group.rank()]:
        raise UserError(
            f"gather_rows: counts says {counts[group.rank()]} rows of rank {group.rank()}, which "
            f"has {len(rows)}"
        )
    return _GatherRows.apply(rows, tuple(counts), group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: tuple[int, ...], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.counts, ctx.group = counts, group
        gathered = _all_gather(rows, max(counts), group)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        counts, group = ctx.counts, ctx.group

        def compute() -> Tensor:
            opmath = opmath_dtype(upstream.dtype)
            padded = upstream.new_zeros(len(counts), max(counts), upstream.shape[1], dtype=opmath)
            for target, part in zip(padded, upstream.split(list(counts)), strict=True):
                target[: len(part)] = part
            local = _reduce_scatter(padded, group)[: counts[group.rank()]]
            return local.to(upstream.dtype)

        return first_derivative("gather_rows", compute, upstream), None, None


def vocab_parallel_embedding(
    ids: Tensor,  # (T,) of this rank; T may differ between ranks
    weight: Tensor,  # (rows, D) of the slice
    vocabulary: VocabularySlice,
    padding_id: int | None = None,
) -> Tensor:  # (T, D)
    """Returns ``weight[ids]`` of the whole weight; the row of ``padding_id`` gets no gradient."""
    check_derivatives("vocab_parallel_embedding", weight)
    return _Embedding.apply(weight, ids, vocabulary, padding_id)


@torch.no_grad()
def vocab_parallel_logits(
    hidden: Tensor,  # (T, D) of this rank; T may differ between ranks
    weight: Tensor,  # (rows, D) of the slice
    bias: Tensor | None,  # (rows,)
    vocabulary: VocabularySlice,
) -> Tensor:  # (T, V)
    """Returns whole logits of this rank's rows, without a gradient: for generation.

    Each rank makes the logits of its slice for the rows of all, and sends each its own.
    """
    group, most = vocabulary.group, vocabulary.most_rows
    length = vocabulary.longest(hidden)
    rows = _all_gather(hidden, length, group)
    logits = torch.nn.functional.linear(rows, weight, bias)
    logits = torch.nn.functional.pad(logits, (0, most - len(weight))).contiguous()
    slices = torch.empty_like(logits)
    if logits.numel():
        dist.all_to_all_single(slices, logits, group=group)
    return slices[:, : len(hidden)].transpose(0, 1).flatten(1)[:, : vocabulary.vocabulary]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, vocabulary: VocabularySlice, padding_id: int | None
    ) -> Tensor:
        group = vocabulary.group
        ctx.length = vocabulary.longest(ids)
        all_ids = _all_gather(ids, ctx.length, group)
        row, mine = vocabulary.localize(all_ids)
        # ranks with fewer ids are padded with id 0, whose rows are cut off and have no gradient
        embedded = weight[row] * mine.unsqueeze(-1).to(weight.dtype)
        if padding_id is not None:
            mine &= all_ids != padding_id
        ctx.save_for_backward(row, mine)
        ctx.group, ctx.rows = group, len(weight)
        return _reduce_scatter(embedded, group)[: len(ids)]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        row, mine = ctx.saved_tensors

        def compute() -> Tensor:
            gathered = _all_gather(upstream, ctx.length, ctx.group) * mine.unsqueeze(-1)
            return torch.ops.aten.embedding_dense_backward(gathered, row, ctx.rows, -1, False)

        return first_derivative("vocab_parallel_embedding", compute, upstream), None, None, None


def _all_gather(
    local: Tensor, length: int, group: dist.ProcessGroup
) -> Tensor:  # (n, …) -> (ranks, length, …)
    """Pads the rows of ranks that have fewer than ``length`` with zeros."""
    return _begin_all_gather(local, length, group)()


def _begin_all_gather(
    local: Tensor, length: int, group: dist.ProcessGroup
) -> Callable[[], Tensor]:  # (n, …) -> (ranks, length, …)
    """Returns what waits for the result; until then products go on."""
    world_size = dist.get_world_size(group)
    padded = local.new_zeros(length, *local.shape[1:])
    padded[: len(local)] = local
    gathered = local.new_empty(world_size * length, *local.shape[1:])
    work: dist.Work | None = None  # tensors without data have nothing to wait for
    if gathered.numel():
        work = _ALL_GATHER(gathered, padded, group=group, async_op=True)

    def wait_for_all_gather() -> Tensor:
        if work is not None:
            work.wait()
        return gathered.unflatten(0, (world_size, length))

    return wait_for_all_gather


def _reduce_scatter(parts: Tensor, group: dist.ProcessGroup) -> Tensor:  # (ranks, n, …) -> (n, …)
    """Returns the sum over ranks of their parts for this rank."""
    local = torch.empty_like(parts[0])
    if local.numel():
        _REDUCE_SCATTER(local, parts.contiguous().flatten(0, 1), group=group)
    return local
