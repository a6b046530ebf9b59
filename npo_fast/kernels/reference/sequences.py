"""Plain PyTorch kernels on token log-probs: sums of sequences, and the NPO loss of the sums."""

import torch
import torch.nn.functional as F
from torch import Tensor


def npo_head(
    log_probs: Tensor,  # (N,) token log-probs of whole sequences, fp32 or fp64
    cu_seqlens: Tensor,  # (S + 1,) where the sequences begin and end, on any device
    ref_log_probs: Tensor,  # (S,)
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # values (S,), sequence_log_probs (S,), g (N,)
    """Returns ``L_i = -(2 / beta) logsigmoid(-beta r_i)``, ``l_i``, ``g_n = 2 sigmoid(beta r_i)``.

    ``r_i = l_i - ref_i``; ``g_n`` is ``dL_i / dl_i`` at every token n of sequence i.
    """
    sequence_log_probs = segment_sum(log_probs, cu_seqlens)
    x = beta * (sequence_log_probs - ref_log_probs.to(log_probs.dtype))
    values = -(2 / beta) * F.logsigmoid(-x)
    g = (2 * torch.sigmoid(x)).repeat_interleave(
        cu_seqlens.diff().to(log_probs.device), output_size=len(log_probs)
    )
    return values, sequence_log_probs, g


def segment_sum(
    values: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (S,)
    """Returns ``sum(values[cu_seqlens[i]:cu_seqlens[i + 1]])`` for each i; 0 where it is empty.

    Summed in fp64: one number a row costs nothing, and beta times its error goes into every g.
    """
    offsets = cu_seqlens.to(values.device, torch.int64)
    sums = torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0, unsafe=True)
    return sums.to(values.dtype)
