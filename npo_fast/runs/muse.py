"""``evaluate --suite muse``: what MUSE fixes, and its measurement of a model."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from npo_fast.data import describe
from npo_fast.errors import UserError
from npo_fast.evaluation.muse import MIN_K_SHARE, evaluate_muse, muse_suite
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.metrics import Result, examples_in, muse
from npo_fast.runs.models import Model, ModelSource
from npo_fast.runs.options import ModelOptions
from npo_fast.runs.progress import progress
from npo_fast.tables import counted

logger = logging.getLogger(__name__)

SuiteName = Literal["tofu", "muse"]
_FIXED = {  # options that TOFU's evaluation reads, and what MUSE does
    **dict.fromkeys(("forget", "retain", "holdout"), "its --data has the sets of all measures"),
    "reference": "it measures no KL",
    "loss_on": "its prompts are texts",
    "utility": "it has no real authors",
    "log_format": "its logs have one form",
    "lm_eval": "it is of its own: evaluate without --suite",
    "paraphrased_questions": "its questions have one wording",
    "gradient_norms": "its attack is Min-K%",
    **dict.fromkeys(("template", "system_prompt", "template_kwargs"), "its prompts are texts"),
    "max_length": "it measures whole texts",
    "memorization": "its texts have no closing token",
}


def check_options(odd: list[str], *groups: ModelOptions | EvaluationSettings) -> None:
    """Raises ``UserError`` for an option that MUSE's evaluation would not read.

    Args:
        odd: keywords of ``evaluate`` that have not their default.
        groups: options with their defaults or others.
    """
    for group in groups:
        plain, names = type(group)(), [field.name for field in fields(group)]
        odd = odd + [name for name in names if getattr(group, name) != getattr(plain, name)]
    for name in odd:
        if name in _FIXED:
            flag = "no-utility" if name == "utility" else name.replace("_", "-")
            raise UserError(f"--suite muse: leave out --{flag}, for {_FIXED[name]}")


def check_kind(logs: Result | None, role: str, suite: SuiteName) -> None:
    """Raises ``UserError`` for logs of another suite than the one that is asked for."""
    if not logs or muse.is_muse(logs) == (suite == "muse"):
        return
    if suite == "muse":
        raise UserError(f"--{role} holds no logs of MUSE: evaluate that model with --suite muse")
    raise UserError(f"--{role} holds logs of MUSE: add --suite muse")


def check_retrained(retrained: Result | None, logs: Result) -> None:
    """Checks logs of a retrained model against logs that exist already."""
    if retrained is not None:
        sizes = {name: examples_in(log) for name, log in logs.items()}
        share = logs[muse.PRIVLEAK_FORGET].get("conventions", {}).get("min_k_share", MIN_K_SHARE)
        muse.check_retrained(retrained, sizes, share)


def measure(
    model: Model,
    data: str | Path | None,
    retrained: Result | None,
    tokenizer: Any,
    loading: ModelOptions,
    settings: EvaluationSettings,
) -> Result:
    """MUSE's logs of a model."""
    name = describe(data)
    if not name:
        raise UserError("--suite muse takes its sets from --data: muse-bench/MUSE-News or a folder")
    suite = muse_suite(name)
    if retrained is not None:
        share = settings.min_k_share or MIN_K_SHARE
        muse.check_retrained(retrained, suite.sizes(), share)
    for split, size in suite.sizes().items():
        logger.info(f"{split}: {counted(size, 'record')}")
    source = ModelSource(model, loading, tokenizer)
    source.device()
    template = source.template()
    with source.loaded() as lm, progress("evaluate") as update:
        return evaluate_muse(lm, template, suite, settings, update)
