"""Plain PyTorch kernels of a linear head: log-probs of labels from hidden states, and the backward.

All rows go through a slice of the vocabulary at a time, so that nothing V-wide exists; the backward
kernel makes the logits of each slice again.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from npo_fast.kernels.layout import (
    empty_gradients,
    empty_logits,
    opmath_dtype,
    product_dtype,
)
from npo_fast.kernels.reference.rows import empty_per_row
from npo_fast.kernels.transform import HeadTransform

TILE_BYTES = 32 << 20  # of logits: TILE_ROWS rows times a slice of the vocabulary
TILE_ROWS = 2048
LEAST_COLUMNS = 64  # of a slice: with fewer, its GEMM costs more than it computes


def linear_log_probs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64 in [0, V)
    bias: Tensor | None,  # (V,)
    transform: HeadTransform,
) -> tuple[Tensor, Tensor]:  # log_probs (N,), lse (N,): fp32, or fp64 for fp64 inputs
    """Returns log-probs of the labels and the logsumexp of each row."""
    log_probs, lse = empty_per_row(hidden), empty_per_row(hidden)
    dtype = product_dtype(weight)
    for rows in _tile_rows(hidden):
        others = lse.new_full((rows.stop - rows.start,), -torch.inf, dtype=torch.float64)
        target = torch.full_like(others, torch.nan)
        for columns, logits in _slices(hidden[rows], weight, bias, dtype):
            torch.ops.npo_fast.tile_log_probs_(
                logits, labels[rows] - columns.start, *transform, others, target
            )
        if dtype != lse.dtype:  # the logit of the label, not rounded
            raw = torch.ops.npo_fast.label_logits(hidden[rows], weight, labels[rows], bias)
            target = transform.apply(raw).double()
        log_probs[rows], lse[rows] = with_label(others, target)
    return log_probs, lse


def with_label(
    others: Tensor,  # (R,) logsumexp of the columns that are not the label
    target: Tensor,  # (R,) z at the label
) -> tuple[Tensor, Tensor]:  # log_probs and lse (R,)
    """Returns ``log_prob = -log(1 + exp(others - target))`` and the lse of all columns.

    Nothing cancels where the model is sure of the label.
    """
    high, low = torch.maximum(others, target), torch.minimum(others, target)
    above = torch.log1p(torch.exp(low - high))
    return (target - high) - above, high + above


def linear_log_probs_backward(
    g: Tensor,  # (N,) d loss / d log_prob
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    log_probs: Tensor,  # (N,) of the forward operator
    lse: Tensor,  # (N,) of the forward operator
    transform: HeadTransform,
    needs: Sequence[bool],  # hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:  # in the dtypes of hidden, weight, bias; empty: not needed
    """Returns the gradients of a loss with derivative ``g`` in the log-probs."""
    opmath = opmath_dtype(hidden.dtype)
    d_hidden, d_weight, d_bias = (
        torch.zeros_like(empty, dtype=opmath)
        for empty in empty_gradients(hidden, weight, bias, needs)
    )
    at_label = -torch.expm1(log_probs)  # onehot - softmax cancels at a sure token
    for rows in _tile_rows(hidden):
        tile_hidden = hidden[rows].to(opmath)
        row_scale = (g[rows] * transform.logit_scale).to(opmath).unsqueeze(1)
        for columns, logits in _slices(tile_hidden, weight, bias, opmath):
            column = labels[rows] - columns.start
            z, slope = transform.apply_with_slope(logits.to(opmath))
            gradient = z.sub_(lse[rows].unsqueeze(1)).exp_().neg_()
            mine = ((column >= 0) & (column < z.shape[1])).nonzero().squeeze(1)
            gradient[mine, column[mine]] = at_label[rows][mine]
            gradient.mul_(row_scale)
            if slope is not None:
                gradient.mul_(slope)
            if needs[0]:
                d_hidden[rows].addmm_(gradient, weight[columns].to(opmath))
            if needs[1]:
                d_weight[columns].addmm_(gradient.t(), tile_hidden)
            if needs[2] and bias is not None:
                d_bias[columns] += gradient.sum(dim=0)
    bias_dtype = hidden.dtype if bias is None else bias.dtype
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias.to(bias_dtype)


def scale_(values: Tensor, factor: Tensor) -> None:  # any shape, ()
    """Computes ``values *= factor``, without a pass over them where the factor is 1."""
    if factor.device.type != "cpu" or factor != 1:  # reading from a GPU would wait for it
        values.mul_(factor)


def _tile_rows(hidden: Tensor) -> list[slice]:
    """Cuts the rows into few parts: BLAS packs a slice of the weight anew for each of them."""
    rows = len(hidden)
    return [slice(at, min(at + TILE_ROWS, rows)) for at in range(0, rows, TILE_ROWS)]


def _slices(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:  # columns, (R, C)
    """Yields slices of the vocabulary and their raw logits, which the next ones overwrite."""
    vocabulary, width = weight.shape
    hidden = hidden.to(dtype)
    converted = 0 if weight.dtype == dtype else width  # the slice of the weight in fp32 counts
    step = max(LEAST_COLUMNS, TILE_BYTES // (dtype.itemsize * (max(1, len(hidden)) + converted)))
    buffer = empty_logits(len(hidden), min(step, vocabulary), weight, dtype)
    for first in range(0, vocabulary, step):
        columns = slice(first, min(first + step, vocabulary))
        operand, logits = weight[columns].to(dtype), buffer[:, : columns.stop - first]
        if bias is None:
            torch.mm(hidden, operand.t(), out=logits)
        else:
            torch.addmm(bias[columns].to(dtype), hidden, operand.t(), out=logits)
        yield columns, logits
