"""``attack``: what comes back when an unlearned model is relearned or rounded."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from npo_fast.attacks.attack import Split
from npo_fast.attacks.attack import attack as attack_model
from npo_fast.attacks.options import AttackOptions
from npo_fast.data import Records, check_vocabulary, describe
from npo_fast.errors import UserError
from npo_fast.evaluation.evaluate import evaluate as evaluate_suite
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import Suite, check_forget_quality, tofu_suite
from npo_fast.metrics import FORGET, Result, retrained_log, save_result
from npo_fast.model.causal_lm import CausalLM
from npo_fast.runs.evaluating import Scores
from npo_fast.runs.models import Model, ModelSource
from npo_fast.runs.options import RELEARNING, AttackData, ModelOptions
from npo_fast.runs.progress import follow, progress
from npo_fast.trainer.settings import TrainSettings

logger = logging.getLogger(__name__)

SUMMARY = "attack.json"


def attack(
    model: Model,
    *,
    forget: Records = "",
    retain: Records | None = None,
    data: str | None = None,
    retrained: str | Path | None = None,
    output: str | Path = "runs/attack",
    overwrite: bool = False,
    tokenizer: Any = None,
    loading: ModelOptions = ModelOptions(),
    attacks: AttackOptions = AttackOptions(),
    training: TrainSettings = RELEARNING,
) -> dict[str, Scores]:
    """Attacks copies of an unlearned model and measures what comes back: ``npo-fast attack``.

    Args:
        model: as for ``unlearn``; it is not changed.
        forget: what was forgotten; relearning trains on a part of it, the rest is measured.
        retain: measured too, where it is given.
        retrained: log of the model trained without the forget set, on all its records.
        output: folder for a folder of logs an attack, and attack.json.
        attacks: which attacks, and how strong.
        training: how to relearn.

    Returns:
        Scores by attack: "before", "relearn", "int8", "int4".

    Raises:
        UserError: something in the input is wrong; the message names the value and the cure.
    """
    folder = Path(output)
    if isinstance(forget, str) and not forget:
        raise UserError("say what was forgotten with --forget (a file, or a split of --data)")
    if (folder / SUMMARY).exists() and not overwrite:
        raise UserError(f"{folder} holds an attack; name another --output or add --overwrite")
    suite = tofu_suite(data, forget, retain, utility=False)
    share = attacks.relearn_share if "relearn" in attacks.names else 0.0
    split = Split.of(len(suite[FORGET]), share, training.seed)
    compared = None
    if retrained is not None:
        check_forget_quality(suite)
        compared = retrained_log(Path(retrained), len(suite[FORGET]), split.rest)
    source = ModelSource(model, loading, tokenizer)
    template = source.template()
    lm = source.load()
    check_vocabulary({"forget": template.encode_all(suite[FORGET])[0]}, lm.vocabulary)
    logger.info(f"{len(split.seen)} forget records to relearn from, {len(split.rest)} to measure")
    settings = EvaluationSettings(
        training.micro_batch_tokens, max_new_tokens=attacks.max_new_tokens
    )

    def measure(attacked: CausalLM, records: Suite, name: str) -> Result:
        with progress(name) as update:
            logs = evaluate_suite(attacked, template, records, settings, update)
        save_result(logs, folder / name)
        return logs

    results = attack_model(
        lm, template, suite, split, attacks, training, measure, follow, logger.info
    )
    scores = {name: Scores(logs, compared) for name, logs in results.items()}
    summary = {
        "measures": scores,
        "relearned_records": split.seen,
        "measured_records": split.rest,
        "settings": {
            "model": asdict(source.options),
            "data": asdict(
                AttackData(describe(forget), None if retain is None else describe(retain), data)
            ),
            "attack": asdict(attacks),
            "training": asdict(training),
        },
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1, default=str), encoding="utf-8")
    logger.info(f"logs saved in {folder}")
    return scores
