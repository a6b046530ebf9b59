"""One visible training loop, and the run folder that keeps what it did."""

from npo_fast.trainer.loop import StepRecord, TrainSettings, reference_log_probs, train
from npo_fast.trainer.run import Run

__all__ = ["Run", "StepRecord", "TrainSettings", "reference_log_probs", "train"]
