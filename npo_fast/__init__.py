"""npo_fast: unlearning for language models, straight from hidden states and the LM head."""

import importlib
from typing import TYPE_CHECKING, Any

from npo_fast._version import __version__
from npo_fast.errors import Interrupted, NonFiniteError, OutOfMemory, UserError

if TYPE_CHECKING:
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
    from npo_fast.ops.linear_kl import linear_kl
    from npo_fast.ops.linear_log_probs import linear_log_probs
    from npo_fast.ops.linear_sequence_loss import linear_sequence_loss
    from npo_fast.ops.one_pass import SequenceLoss
    from npo_fast.ops.segments import segment_sum
    from npo_fast.ops.sequence_log_probs import sequence_log_probs
    from npo_fast.ops.skipping import Skipped

if TYPE_CHECKING:  # after the others, which mypy would confuse with modules
    from npo_fast.model.head import head_of
    from npo_fast.runs import *

# PyTorch takes seconds to import, and transformers more: each name imports what it needs
_PACKAGES = ("ops", "losses", "modules", "model.head", "runs")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for package in _PACKAGES:
            module = importlib.import_module(f"npo_fast.{package}")
            if hasattr(module, name):
                return getattr(module, name)
    if name in (*_PACKAGES, "kernels"):
        return importlib.import_module(f"npo_fast.{name}")
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
