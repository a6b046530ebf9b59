"""npo_fast: unlearning for language models, straight from hidden states and the LM head."""

from typing import TYPE_CHECKING, Any

from npo_fast._version import __version__
from npo_fast.errors import Interrupted, NonFiniteError, OutOfMemory, UserError
from npo_fast.losses import CEU, DPO, GA, KTO, NLL, NPO, TNPO, WGA, SatImp, SimNPO, npo_loss
from npo_fast.modules import (
    FusedLinearDPOLoss,
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

if TYPE_CHECKING:
    from npo_fast.runs import (
        AttackOptions,
        Callback,
        EvaluationOptions,
        EvaluationSettings,
        MethodOptions,
        ModelOptions,
        ReportOptions,
        Run,
        RunOptions,
        Scores,
        TrainSettings,
        attack,
        evaluate,
        finetune,
        report,
        unlearn,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:  # loaded when it is asked for: transformers takes seconds to import
        from npo_fast import runs

        return getattr(runs, name)
    raise AttributeError(f"module 'npo_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "CEU",
    "DPO",
    "GA",
    "KTO",
    "NLL",
    "NPO",
    "TNPO",
    "WGA",
    "AttackOptions",
    "Callback",
    "EvaluationOptions",
    "EvaluationSettings",
    "FusedLinearDPOLoss",
    "FusedLinearGALoss",
    "FusedLinearNLLLoss",
    "FusedLinearNPOLoss",
    "FusedLinearSequenceLoss",
    "FusedLinearSimNPOLoss",
    "Interrupted",
    "MethodOptions",
    "ModelOptions",
    "NonFiniteError",
    "OutOfMemory",
    "ReportOptions",
    "Run",
    "RunOptions",
    "SatImp",
    "Scores",
    "SequenceLoss",
    "SimNPO",
    "Skipped",
    "TrainSettings",
    "UserError",
    "__version__",
    "attack",
    "evaluate",
    "finetune",
    "linear_kl",
    "linear_log_probs",
    "linear_sequence_loss",
    "npo_loss",
    "report",
    "segment_sum",
    "unlearn",
]
