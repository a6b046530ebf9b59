"""Row kernel: log-probs of labels from raw logits, and their gradient written over the logits.

    z_n        = logit_scale * softcap * tanh(a_n / softcap)
    log_prob_n = z_n[y_n] - logsumexp(z_n)
    a_n       <- (onehot(y_n) - softmax(z_n)) * d z_n / d a_n        (in place)

Not allocated: probabilities, an fp32 copy of the logits, a one-hot. One program a row and no
other program's result, so no atomics. A row that fits on chip is read once and written once. A
longer one is read twice, backwards the second time: its tail is then still in cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npo_fast.kernels.triton.config import RowConfig, row_config
from npo_fast.kernels.triton.math import activate, one_minus_exp, online_add

# finite, so that the difference of two of them is 0 and not NaN
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _block_logits(
    row, columns, vocabulary, label, target, softcap, logit_scale,
    HAS_TARGET: tl.constexpr, SOFTCAP: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """One block of a row: z (-inf past the end) and dz / da."""
    inside = columns < vocabulary
    raw = tl.load(row + columns, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    if HAS_TARGET:
        raw = tl.where(columns == label, target, raw)
    z, slope = activate(raw, softcap, logit_scale, SOFTCAP)
    return tl.where(inside, z, -float("inf")), slope


@triton.jit
def _store_row(log_probs, lses, n, target_z, peak, total):
    log_prob = (target_z - peak) - tl.log(total)  # nearly equal numbers first: exact
    tl.store(log_probs + n, log_prob)
    tl.store(lses + n, peak + tl.log(total))
    return log_prob


@triton.jit
def _block_gradient(exps, slope, columns, label, log_prob, total):
    # onehot - softmax cancels at a sure token; 1 - p from the log-prob does not
    at_label = columns == label
    return tl.where(at_label, one_minus_exp(log_prob), -exps / total) * slope


@triton.jit
def row_log_probs_kernel(
    logits, labels, target_logits, log_probs, lses, vocabulary, row_stride, softcap, logit_scale,
    HAS_TARGET: tl.constexpr, SOFTCAP: tl.constexpr,
    IN_PLACE: tl.constexpr, ON_CHIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)  # n * V passes 2^31
    row = logits + n * row_stride
    label = tl.load(labels + n).to(tl.int32)
    if HAS_TARGET:
        target = tl.load(target_logits + n).to(tl.float32)
    else:
        target = tl.load(row + label).to(tl.float32)
    target_z = activate(target, softcap, logit_scale, SOFTCAP)[0]
    lanes = tl.arange(0, BLOCK)

    if ON_CHIP:
        z, slope = _block_logits(
            row, lanes, vocabulary, label, target, softcap, logit_scale,
            HAS_TARGET, SOFTCAP, "evict_first",
        )  # fmt: skip
        peak = tl.max(z)
        exps = tl.exp(z - peak)
        total = tl.sum(exps)
        log_prob = _store_row(log_probs, lses, n, target_z, peak, total)
        gradient = _block_gradient(exps, slope, lanes, label, log_prob, total)
        tl.store(row + lanes, gradient.to(logits.dtype.element_ty), mask=lanes < vocabulary)
    else:
        # a running (peak, total) a lane: nothing crosses lanes before the row ends
        peaks = tl.full((BLOCK,), LOWEST, tl.float32)
        totals = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            z, _ = _block_logits(
                row, start + lanes, vocabulary, label, target, softcap, logit_scale,
                HAS_TARGET, SOFTCAP, "evict_last" if IN_PLACE else "evict_first",
            )  # fmt: skip
            peaks, totals = online_add(peaks, totals, z)
        peak = tl.max(peaks)
        total = tl.sum(totals * tl.exp(peaks - peak))
        log_prob = _store_row(log_probs, lses, n, target_z, peak, total)
        if IN_PLACE:
            last = (vocabulary - 1) // BLOCK * BLOCK
            for back in range(0, vocabulary, BLOCK):
                columns = last - back + lanes
                z, slope = _block_logits(
                    row, columns, vocabulary, label, target, softcap, logit_scale,
                    HAS_TARGET, SOFTCAP, "evict_first",
                )  # fmt: skip
                exps = tl.exp(z - peak)
                gradient = _block_gradient(exps, slope, columns, label, log_prob, total)
                inside = columns < vocabulary
                tl.store(row + columns, gradient.to(logits.dtype.element_ty), mask=inside)


def row_log_probs(
    logits: Tensor,  # (R, V) raw logits, rows contiguous; in_place: d log_prob / d logits on return
    labels: Tensor,  # (R,) in [0, V)
    target_logits: Tensor | None,  # (R,) raw target logits that replace the rounded ones
    softcap: float | None,
    logit_scale: float,
    *,
    in_place: bool,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:  # log_probs (R,) fp32, lse (R,) fp32
    assert logits.stride(1) == 1 or logits.shape[1] == 1, logits.stride()
    rows, vocabulary = logits.shape
    log_probs = logits.new_empty(rows, dtype=torch.float32)
    lse = torch.empty_like(log_probs)
    if rows == 0:
        return log_probs, lse
    config = config or row_config()
    on_chip = in_place and config.on_chip(vocabulary, softcap is not None)
    block = triton.next_power_of_2(vocabulary) if on_chip else config.block
    row_log_probs_kernel[(rows,)](
        logits, labels.contiguous(), _contiguous(target_logits), log_probs, lse,
        vocabulary, logits.stride(0), softcap or 1.0, logit_scale,
        HAS_TARGET=target_logits is not None, SOFTCAP=softcap is not None,
        IN_PLACE=in_place, ON_CHIP=on_chip, BLOCK=block, num_warps=config.warps(block),
    )  # fmt: skip
    return log_probs, lse


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()
