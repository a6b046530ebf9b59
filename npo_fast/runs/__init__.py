"""The front door: ``unlearn``, ``finetune``, ``evaluate``, ``attack`` and ``report``.

Each takes models, data and settings as keywords and is what the command line calls. ``Run`` is a
run folder as an object, ``Callback`` what hears of a run while it trains.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
# transformers takes seconds to import, and the options, which are in this package too, need none
_MODULES = {
    "AttackOptions": "attacks.options", "EvaluationSettings": "evaluation.settings",
    "TrainSettings": "trainer.settings", "attack": "runs.attacking", "Callback": "runs.callbacks",
    "evaluate": "runs.evaluating", "finetune": "runs.finetuning", "report": "runs.reporting",
    "Run": "runs.run", "Scores": "runs.scores", "unlearn": "runs.unlearning",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'npo_fast.runs' has no attribute {name!r}")
    module = importlib.import_module(f"npo_fast.{_MODULES.get(name, 'runs.options')}")
    return getattr(module, name)
