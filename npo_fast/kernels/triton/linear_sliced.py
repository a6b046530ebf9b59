"""A linear head over slices of the vocabulary: vendor GEMMs, and the row kernels on what they make.

    forward:   sums of each slice's logits, joined at the end             2NDV flops
    backward:  logits of a slice again from the logsumexp, their gradient
               d_hidden += G @ W[slice],  d_weight[slice] = G.T @ h       6NDV flops

Each slice of ``d_weight`` is finished at once in the weight's dtype: no accumulation, no V-wide
memory. ``d_hidden`` adds up in fp32. Every element is added up in one order: no atomics.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast.kernels.products import add_product_
from npo_fast.kernels.reference import logits_room, padded_rows
from npo_fast.kernels.triton.config import row_config
from npo_fast.kernels.triton.label_logits import label_logits
from npo_fast.kernels.triton.row_log_probs import gradient_, with_labels
from npo_fast.kernels.triton.scale import scale_rows
from npo_fast.kernels.triton.slices import Sums, slice_sums

SLICE_BYTES = 32 << 20  # of logits: they are read again from cache
LEAST_COLUMNS = 2048  # d_hidden goes through memory once a slice


def sliced_forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) in [0, V)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:  # log_probs (N,) fp32, lse (N,) fp32
    if len(hidden) == 0:
        empty = hidden.new_empty(0, dtype=torch.float32)
        return empty, torch.empty_like(empty)
    config = row_config()
    target = label_logits(hidden, weight, labels, bias)
    sums = [
        slice_sums(logits[: len(hidden)], labels - columns.start, softcap, logit_scale, config)
        for columns, logits in _slices(hidden, weight, bias)
    ]
    joined = Sums(*(torch.cat(parts) for parts in zip(*sums, strict=True)))
    return with_labels(joined, target, softcap, logit_scale)[:2]


def sliced_backward(
    g: Tensor,  # (N,) d loss / d log_prob
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    log_probs: Tensor,  # (N,) of the forward pass
    lse: Tensor,  # (N,) of the forward pass
    softcap: float | None,
    logit_scale: float,
    needs: Sequence[bool],  # hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:  # d_hidden, d_weight, d_bias; empty: not wanted
    wants_bias = bias is not None and needs[2]
    d_weight = weight.new_empty(weight.shape if needs[1] else 0)
    d_bias = (hidden if bias is None else bias).new_empty(len(weight) if wants_bias else 0)
    if len(hidden) == 0:
        return torch.empty_like(hidden), d_weight.zero_(), d_bias.zero_()
    config, rows = row_config(), len(hidden)
    padded = padded_rows(rows, on_cpu=False)
    d_hidden = hidden.new_empty(padded if needs[0] else 0, hidden.shape[1], dtype=torch.float32)
    scaled = None
    if needs[1]:
        scaled = hidden.new_zeros(padded, hidden.shape[1])
        scale_rows(scaled[:rows], hidden, g)
    slope = logit_scale * torch.ones_like(lse)
    if softcap is not None:
        slope *= 1 - ((log_probs + lse) / (softcap * logit_scale)).square()
    of_rows = lse, torch.ones_like(lse), -torch.expm1(log_probs) * slope
    for columns, logits in _slices(hidden, weight, bias):
        own = logits[:rows]
        gradient_(own, labels - columns.start, *of_rows, softcap, logit_scale, config)
        logits[rows:] = 0
        if needs[0]:
            add_product_(d_hidden, logits, weight[columns], beta=int(columns.start > 0))
        if scaled is not None:
            torch.mm(logits.t(), scaled, out=d_weight[columns])
        if wants_bias:
            d_bias[columns] = torch.mv(own.t().float(), g.float()).to(d_bias.dtype)
    if not needs[0]:
        return hidden.new_empty(0), d_weight, d_bias
    out = torch.empty_like(hidden)
    scale_rows(out, d_hidden[:rows], g)
    return out, d_weight, d_bias


def _slices(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:  # columns, raw logits (padded N, C) until the next ones
    rows, vocabulary = padded_rows(len(hidden), on_cpu=False), len(weight)
    if rows > len(hidden):
        hidden = F.pad(hidden, (0, 0, 0, rows - len(hidden)))
    step = max(LEAST_COLUMNS, SLICE_BYTES // (rows * hidden.itemsize))
    room = logits_room(rows, min(step, vocabulary), weight, hidden.dtype)
    for first in range(0, vocabulary, step):
        columns = slice(first, min(first + step, vocabulary))
        logits = room[:, : columns.stop - first]
        if bias is None:
            torch.mm(hidden, weight[columns].t(), out=logits)
        else:
            torch.addmm(bias[columns], hidden, weight[columns].t(), out=logits)
        yield columns, logits
