"""The Triton kernels at N=4096, D=4096, V=128256 in bf16: predicted, or measured on a GPU.

Without a GPU every kernel is compiled for every target and its machine code inspected; the time is
the H100's floor from flops and bytes. With a GPU, ``measure`` times the same shape.
``benchmarks/gpu.py`` measures more.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from npo_fast.kernels.layout import empty_logits
from npo_fast.kernels.transform import HeadTransform
from npo_fast.kernels.triton.config import h100_floor_ms
from npo_fast.kernels.triton.offline import Record
from npo_fast.kernels.triton.variants import HALF, D, N, V

SEQUENCES = 64
GEMM_FLOPS = 2.0 * N * D * V
OPERAND_BYTES, LOGITS_BYTES = HALF * (N * D + V * D), HALF * N * V
ROW_KERNELS = (("slice_sums", "plain, labels"), ("gradient", "plain"), ("npo_head", "plain"))
PLAIN = HeadTransform()  # neither a softcap nor a scale


def predict(records: Iterable[Record]) -> dict[str, float]:
    """Floors of whole steps on an H100, in ms, summed from those of their kernels."""
    floors = {
        (record.kernel, record.variant): record.h100_floor_ms
        for record in records
        if record.h100_floor_ms is not None and record.dtype == "bf16"
    }
    gemms = 3 * h100_floor_ms(GEMM_FLOPS, OPERAND_BYTES + LOGITS_BYTES)
    return {"three_gemms_ms": gemms, "fused_loss_ms": gemms + sum(floors[k] for k in ROW_KERNELS)}


def measure(device: torch.device) -> list[dict[str, Any]]:
    """Median time of each kernel's launch on this GPU, beside the floor of an H100."""
    from triton.testing import do_bench

    from npo_fast.kernels.triton.linear import linear_backward, linear_forward
    from npo_fast.kernels.triton.npo_head import npo_head
    from npo_fast.kernels.triton.row_log_probs import row_gradient, row_log_probs

    options: Any = {"device": device, "dtype": torch.bfloat16}
    hidden = torch.randn(N, D, **options)
    weight = torch.randn(V, D, **options) * D**-0.5
    logits = empty_logits(N, V, weight, torch.bfloat16)
    torch.mm(hidden, weight.T, out=logits)
    labels = torch.randint(V, (N,), device=device)
    cu_seqlens = torch.arange(0, N + 1, N // SEQUENCES, device=device, dtype=torch.int32)
    ref = torch.zeros(SEQUENCES, device=device)
    log_probs, lse = linear_forward(hidden, weight, labels, None, PLAIN)
    g, target = torch.full_like(log_probs, 1.0 / SEQUENCES), torch.zeros_like(log_probs)
    ones = torch.ones_like(lse)
    head = (hidden, weight, labels, None)
    launches: dict[str, tuple[Callable[[], object], float, float]] = {  # call, flops, bytes
        "logits GEMM": (
            partial(torch.mm, hidden, weight.T, out=logits),
            GEMM_FLOPS, OPERAND_BYTES + LOGITS_BYTES,
        ),
        "row_log_probs": (partial(row_log_probs, logits, labels, target, PLAIN), 0.0, LOGITS_BYTES),
        "row_gradient": (
            partial(row_gradient, logits, labels, log_probs, lse, ones, g, PLAIN),
            0.0, 2 * LOGITS_BYTES,
        ),
        "npo_head": (partial(npo_head, log_probs, cu_seqlens, ref, 0.1), 0.0, 8.0 * N),
        "linear_forward": (partial(linear_forward, *head, PLAIN), GEMM_FLOPS, OPERAND_BYTES),
        "linear_backward": (
            partial(linear_backward, g, *head, log_probs, lse, PLAIN, (True, True, True)),
            3 * GEMM_FLOPS, 2 * OPERAND_BYTES,
        ),
    }  # fmt: skip
    return [
        {
            "kernel": name,
            "time_ms": do_bench(call, return_mode="median"),
            "h100_floor_ms": h100_floor_ms(flops, moved),
        }
        for name, (call, flops, moved) in launches.items()
    ]
