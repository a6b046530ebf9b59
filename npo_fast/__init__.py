"""npo_fast: unlearning for language models, straight from hidden states and the LM head."""

from npo_fast._version import __version__
from npo_fast.losses import CEU, DPO, GA, KTO, NLL, NPO, TNPO, WGA, SatImp, SimNPO, npo_loss
from npo_fast.modules import (
    FusedLinearGALoss,
    FusedLinearNLLLoss,
    FusedLinearNPOLoss,
    FusedLinearSequenceLoss,
    FusedLinearSimNPOLoss,
)
from npo_fast.ops import (
    SequenceLoss,
    Skipped,
    linear_kl,
    linear_log_probs,
    linear_sequence_loss,
    segment_sum,
)

__all__ = [
    "CEU",
    "DPO",
    "GA",
    "KTO",
    "NLL",
    "NPO",
    "TNPO",
    "WGA",
    "FusedLinearGALoss",
    "FusedLinearNLLLoss",
    "FusedLinearNPOLoss",
    "FusedLinearSequenceLoss",
    "FusedLinearSimNPOLoss",
    "SatImp",
    "SequenceLoss",
    "SimNPO",
    "Skipped",
    "__version__",
    "linear_kl",
    "linear_log_probs",
    "linear_sequence_loss",
    "npo_loss",
    "segment_sum",
]
