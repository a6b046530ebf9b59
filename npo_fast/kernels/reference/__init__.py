"""Plain PyTorch kernels of every operator: the specification, and the default on every device."""

from npo_fast.kernels.reference.linear import (
    linear_log_probs,
    linear_log_probs_backward,
    scale_,
)
from npo_fast.kernels.reference.rows import (
    label_logits,
    row_gradient_,
    row_kl_,
    row_log_probs,
    tile_log_probs_,
)
from npo_fast.kernels.reference.sequences import npo_head, segment_sum

__all__ = [
    "label_logits",
    "linear_log_probs",
    "linear_log_probs_backward",
    "npo_head",
    "row_gradient_",
    "row_kl_",
    "row_log_probs",
    "scale_",
    "segment_sum",
    "tile_log_probs_",
]
