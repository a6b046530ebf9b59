"""npo_fast: unlearning for language models, straight from hidden states and the LM head."""

from typing import TYPE_CHECKING, Any

from npo_fast._version import __version__
from npo_fast.errors import Interrupted, NonFiniteError, OutOfMemory, UserError
from npo_fast.losses import (
    CEU,
    DPO,
    GA,
    KTO,
    NLL,
    NPO,
    TNPO,
    WGA,
    SatImp,
    SimNPO,
    npo_loss,
    suggest_beta,
)
from npo_fast.modules import (
    FusedLinearDPOLoss,
    FusedLinearGALoss,
    FusedLinearKLLoss,
    FusedLinearKTOLoss,
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
    sequence_log_probs,
)

if TYPE_CHECKING:
    from npo_fast.model.head import head_of
    from npo_fast.runs import *


def __getattr__(name: str) -> Any:
    if name in __all__:  # transformers takes seconds to import
        if name == "head_of":
            from npo_fast.model.head import head_of

            return head_of
        from npo_fast import runs  # the front door

        return getattr(runs, name)
    raise AttributeError(f"module 'npo_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "CEU", "DPO", "GA", "KTO", "NLL", "NPO", "TNPO", "WGA", "AttackOptions", "Callback",
    "EvaluationOptions", "EvaluationSettings", "FusedLinearDPOLoss", "FusedLinearGALoss",
    "FusedLinearKLLoss", "FusedLinearKTOLoss", "FusedLinearNLLLoss", "FusedLinearNPOLoss",
    "FusedLinearSequenceLoss", "FusedLinearSimNPOLoss", "Interrupted", "MethodOptions",
    "ModelOptions", "NonFiniteError", "OutOfMemory", "ReportOptions", "Run", "RunOptions", "SatImp",
    "Scores", "SequenceLoss", "SimNPO", "Skipped", "TrainSettings", "UserError", "__version__",
    "attack", "evaluate", "finetune", "head_of", "linear_kl", "linear_log_probs",
    "linear_sequence_loss", "npo_loss", "report", "segment_sum", "sequence_log_probs",
    "suggest_beta", "unlearn",
]  # fmt: skip
