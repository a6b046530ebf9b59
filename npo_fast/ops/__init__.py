"""Fused linear layer and loss: from hidden states and the LM head, without all logits in memory."""

from npo_fast.ops.linear_kl import linear_kl
from npo_fast.ops.linear_log_probs import linear_log_probs
from npo_fast.ops.linear_sequence_loss import Reduction, linear_sequence_loss
from npo_fast.ops.one_pass import Reference, SequenceLoss
from npo_fast.ops.segments import segment_sum
from npo_fast.ops.sequence_log_probs import sequence_log_probs
from npo_fast.ops.skipping import Skipped

__all__ = [
    "Reduction", "Reference", "SequenceLoss", "Skipped", "linear_kl", "linear_log_probs",
    "linear_sequence_loss", "segment_sum", "sequence_log_probs",
]  # fmt: skip
