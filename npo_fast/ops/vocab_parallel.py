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

from collections.abc import Sequence
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

# newer names since PyTorch 2.13, which warns of the older ones
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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
        log_probs, lse = torch.ops.npo_fast.linear_log_probs(
            hidden, self.weight, column, self.bias, *self.transform
        )
        return self._combine(log_probs, lse, mine)[0]

    def softmax(
        self, logits: Tensor, hidden: Tensor, labels: Tensor
    ) -> Softmax:  # (padded R, V) raw logits of (R, D), (R,)
        """Runs the row kernel on this slice, and normalises over the whole vocabulary."""
        column, mine = self.vocabulary.localize(pad_rows(labels, len(logits)))
        local = super().softmax(logits, hidden, column[: len(labels)])
        log_probs, lse = self._combine(local.log_probs, local.lse, mine)
        share = local.share * torch.exp(local.lse - lse)
        return Softmax(log_probs, lse, torch.where(mine, column, -1), local.shift, share)

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
        return self.activate(logits).sub_(self.lse(logits, self.transform).unsqueeze(1))

    def lse(self, logits: Tensor, transform: HeadTransform) -> Tensor:  # (R, rows) raw -> (R,)
        """Returns the logsumexp over the whole vocabulary."""
        any_label = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        _, lse, *_ = torch.ops.npo_fast.row_log_probs(logits, any_label, None, *transform)
        gathered = _all_gather(lse[None], 1, self.vocabulary.group)[:, 0]
        return gathered.logsumexp(dim=0)

    def sum_over_ranks(self, values: Tensor) -> Tensor:  # (R,), overwritten
        """Returns the sum over the slices of all ranks."""
        dist.all_reduce(values, group=self.vocabulary.group)
        return values

    def combine_means(self, lse: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:  # (R,), (R,)
        """Returns logsumexp, and mean under the softmax, over the slices of all ranks."""
        gathered = _all_gather(torch.stack([lse, mean]), 2, self.vocabulary.group)
        over_all = gathered[:, 0].logsumexp(dim=0)
        return over_all, (torch.exp(gathered[:, 0] - over_all) * gathered[:, 1]).sum(dim=0)

    def _combine(
        self,
        log_probs: Tensor,  # (R,) within the slice, of the label where that has it
        lse: Tensor,  # (R,) over the slice
        mine: Tensor,  # (R,) whether the slice has the label
    ) -> tuple[Tensor, Tensor]:  # log_probs and lse over the whole vocabulary
        without_label = lse + torch.log(-torch.expm1(log_probs.clamp(max=0.0)))
        local = torch.stack(
            [torch.where(mine, without_label, lse), torch.where(mine, log_probs + lse, 0.0)]
        )
        gathered = _all_gather(local, len(local), self.vocabulary.group)
        others, z = gathered[:, 0].logsumexp(dim=0), gathered[:, 1].sum(dim=0)
        log_probs = -torch.nn.functional.softplus(others - z)
        lse = torch.where(z == -torch.inf, others, z - log_probs)  # the label may be masked
        return log_probs, lse


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
    world_size = dist.get_world_size(group)
    padded = local.new_zeros(length, *local.shape[1:])
    padded[: len(local)] = local
    gathered = local.new_empty(world_size * length, *local.shape[1:])
    if gathered.numel():
        _ALL_GATHER(gathered, padded, group=group)
    return gathered.unflatten(0, (world_size, length))


def _reduce_scatter(parts: Tensor, group: dist.ProcessGroup) -> Tensor:  # (ranks, n, …) -> (n, …)
    """Returns the sum over ranks of their parts for this rank."""
    local = torch.empty_like(parts[0])
    if local.numel():
        _REDUCE_SCATTER(local, parts.contiguous().flatten(0, 1), group=group)
    return local
