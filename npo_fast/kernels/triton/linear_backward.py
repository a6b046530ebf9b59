"""Backward of ``linear_forward`` by recomputation, a chunk of the vocabulary at a time.

    for each chunk of the vocabulary:
        G                = logits_gradient(hidden, weight[chunk])     # 2NDC flops, into a workspace
        d_hidden        += G @ weight[chunk]                          # 2NDC, fp32
        d_weight[chunk]  = G.T @ hidden                               # 2NDC, written once

Why a workspace: a program that owned rows of d_hidden at D=4096 would need D / BLOCK accumulators
or recompute the logits D / BLOCK times (16 times the flops of the first line). G, written once
and read twice, costs 6 bytes an element against 6D flops: nothing at D in the thousands.
Why chunks of columns, not of rows: d_weight is then finished with its chunk, so its fp32 copy
(2.1 GB at V=128256, D=4096) is never allocated; only d_hidden (N x D) accumulates in memory.
Every element is added up by one program in one order: no atomics, bit-identical runs.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from npo_fast.kernels.triton.config import TileConfig, tile_config
from npo_fast.kernels.triton.hidden_gradient import hidden_gradient
from npo_fast.kernels.triton.logits_gradient import logits_gradient
from npo_fast.kernels.triton.weight_gradient import weight_gradient

WORKSPACE_BYTES = 32 << 20  # G of one chunk, so that it is read back from L2
# d_hidden goes through memory once a chunk, 8ND bytes against 6NDC flops: at this width a fifth
# of the time that an H100 computes
LEAST_COLUMNS = 2048


def linear_backward(
    g: Tensor,  # (N,) d loss / d log_prob
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    log_probs: Tensor,  # (N,) of the forward pass
    lse: Tensor,  # (N,) of the forward pass
    softcap: float | None,
    logit_scale: float,
    needs: Sequence[bool] = (True, True, True),  # hidden, weight, bias
    *,
    columns: int | None = None,  # of a chunk; None chooses
    configs: tuple[TileConfig, TileConfig, TileConfig] | None = None,  # G, d_hidden, d_weight
) -> tuple[Tensor, Tensor, Tensor]:  # d_hidden, d_weight, d_bias; empty: not wanted
    assert hidden.stride(1) == weight.stride(1) == 1, (hidden.stride(), weight.stride())
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    make, to_hidden, to_weight = configs or (
        tile_config("logits_gradient", hidden.dtype, softcap is not None),
        tile_config("hidden_gradient", hidden.dtype),
        tile_config("weight_gradient", hidden.dtype),
    )
    wants_bias = bias is not None and needs[2]
    d_hidden = hidden.new_empty((rows, width) if needs[0] else 0, dtype=torch.float32)
    d_weight = weight.new_empty(weight.shape if needs[1] else 0)
    d_bias = (hidden if bias is None else bias).new_empty(vocabulary if wants_bias else 0)
    if rows == 0:
        return d_hidden.to(hidden.dtype), d_weight.zero_(), d_bias.zero_()

    padded_rows = triton.cdiv(rows, make.block_m) * make.block_m
    chunk = columns or max(LEAST_COLUMNS, WORKSPACE_BYTES // (padded_rows * hidden.itemsize))
    tiles = min(chunk // make.block_n or 1, triton.cdiv(vocabulary, make.block_n))
    chunk = tiles * make.block_n
    workspace = hidden.new_empty(padded_rows, chunk)
    g, labels = g.contiguous(), labels.contiguous()
    for first in range(0, vocabulary, chunk):
        left = triton.cdiv(vocabulary - first, make.block_n) * make.block_n
        gradient = workspace[:, :left]
        logits_gradient(
            gradient, hidden, weight, labels, bias, g, log_probs, lse,
            first, softcap, logit_scale, make,
        )  # fmt: skip
        if needs[0]:
            hidden_gradient(d_hidden, gradient, weight, first, first > 0, to_hidden)
        if needs[1]:
            weight_gradient(d_weight, gradient, hidden, first, to_weight)
        if wants_bias:
            part = d_bias[first : first + chunk]
            part.copy_(gradient.sum(dim=0, dtype=torch.float32)[: len(part)])
    return d_hidden.to(hidden.dtype), d_weight, d_bias
