"""The operators' GPU kernels. ROCm uses the same dispatch key.

Triton is imported by the first call, not by ``import npo_fast``.
"""

import torch
from torch import Tensor

from npo_fast.kernels import reference

KEY = "CUDA"


def row_log_probs_(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    if not _triton_serves(logits):
        return reference.row_log_probs_(logits, labels, target_logits, softcap, logit_scale)
    from npo_fast.kernels.triton.row_log_probs import row_log_probs as launch

    with torch.cuda.device_of(logits):
        return launch(logits, labels, target_logits, softcap, logit_scale, in_place=True)


def row_log_probs(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    if not _triton_serves(logits):
        return reference.row_log_probs(logits, labels, target_logits, softcap, logit_scale)
    from npo_fast.kernels.triton.row_log_probs import row_log_probs as launch

    with torch.cuda.device_of(logits):
        return launch(logits, labels, target_logits, softcap, logit_scale, in_place=False)


def npo_head(
    log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    if log_probs.dtype == torch.float64:
        return reference.npo_head(log_probs, cu_seqlens, ref_log_probs, beta)
    from npo_fast.kernels.triton.npo_head import npo_head as launch

    with torch.cuda.device_of(log_probs):
        return launch(log_probs, cu_seqlens, ref_log_probs, beta)


def row_kl_(
    logits: Tensor,
    ref_logits: Tensor,
    softcap: float | None,
    logit_scale: float,
    ref_softcap: float | None,
    ref_logit_scale: float,
) -> Tensor:
    arguments = (logits, ref_logits, softcap, logit_scale, ref_softcap, ref_logit_scale)
    if not (_triton_serves(logits) and _triton_serves(ref_logits)):
        return reference.row_kl_(*arguments)
    from npo_fast.kernels.triton.row_kl import row_kl_ as launch

    with torch.cuda.device_of(logits):
        return launch(*arguments)


def _triton_serves(logits: Tensor) -> bool:
    """fp64 (gradcheck) and rows that are not contiguous are not worth a kernel of their own."""
    return logits.dtype != torch.float64 and logits.stride(-1) == 1


for _kernel in (row_log_probs_, row_log_probs, npo_head, row_kl_):
    reference.library.impl(_kernel.__name__, _kernel, KEY)
