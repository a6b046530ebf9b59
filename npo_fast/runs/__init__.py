"""The front door: ``unlearn``, ``finetune``, ``evaluate``, ``attack`` and ``report``.

Each takes models, data and settings as keywords and is what the command line calls. ``Run`` is a
run folder as an object, ``Callback`` what hears of a run while it trains.
"""

from npo_fast.attacks.options import AttackOptions
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.runs.attacking import attack
from npo_fast.runs.callbacks import Callback
from npo_fast.runs.evaluating import evaluate
from npo_fast.runs.finetuning import finetune
from npo_fast.runs.options import (
    EvaluationOptions,
    MethodOptions,
    ModelOptions,
    ReportOptions,
    RunOptions,
)
from npo_fast.runs.reporting import report
from npo_fast.runs.run import Run
from npo_fast.runs.scores import Scores
from npo_fast.runs.unlearning import unlearn
from npo_fast.trainer.settings import TrainSettings

__all__ = [
    "AttackOptions", "Callback", "EvaluationOptions", "EvaluationSettings", "MethodOptions",
    "ModelOptions", "ReportOptions", "Run", "RunOptions", "Scores", "TrainSettings", "attack",
    "evaluate", "finetune", "report", "unlearn",
]  # fmt: skip
