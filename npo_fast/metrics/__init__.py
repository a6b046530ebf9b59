"""Measures of unlearning: per-example logs in, numbers out. Needs numpy and scipy only.

``logs`` are in memory, ``files`` on disk, in TOFU's form or open-unlearning's. ``tofu`` has TOFU's
formulas, ``memorization`` those of memorization and membership inference, and ``measures`` is the
registry of every measure.
"""

from npo_fast.metrics.files import (
    LOG_FILES,
    LogForm,
    holds_logs,
    load_result,
    retrained_log,
    save_result,
)
from npo_fast.metrics.logs import (
    AGGREGATED,
    FORGET,
    HOLDOUT,
    LOGS,
    REAL_AUTHORS,
    RETAIN,
    SETS,
    WORLD_FACTS,
    Log,
    Result,
    check_comparable,
    column,
    examples_in,
    has_truth_ratio,
    select,
)
from npo_fast.metrics.measures import MEASURES, kl_to_reference, summary
from npo_fast.metrics.memorization import membership_auc
from npo_fast.metrics.tofu import (
    forget_quality,
    forget_truth_ratio,
    knowledge_ratio,
    model_utility,
    probability,
    right_share,
    rouge_l_recall,
    truth_ratio,
    utility_terms,
)

__all__ = [
    "AGGREGATED", "FORGET", "HOLDOUT", "LOGS", "LOG_FILES", "MEASURES", "REAL_AUTHORS", "RETAIN",
    "SETS", "WORLD_FACTS", "Log", "LogForm", "Result", "check_comparable", "column", "examples_in",
    "forget_quality", "forget_truth_ratio", "has_truth_ratio", "holds_logs", "kl_to_reference",
    "knowledge_ratio", "load_result", "membership_auc", "model_utility", "probability",
    "retrained_log", "right_share", "rouge_l_recall", "save_result", "select", "summary",
    "truth_ratio", "utility_terms",
]  # fmt: skip
