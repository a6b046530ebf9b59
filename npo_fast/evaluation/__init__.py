"""TOFU's evaluation: a model and records in, per-example logs in TOFU's own form out."""

from npo_fast.evaluation.evaluate import EvaluationSettings, evaluate
from npo_fast.evaluation.suite import Suite, tofu_suite

__all__ = ["EvaluationSettings", "Suite", "evaluate", "tofu_suite"]
