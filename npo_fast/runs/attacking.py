"""``attack``: what comes back when an unlearned model is relearned or rounded."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from npo_fast.attacks.options import AttackOptions
from npo_fast.attacks.quantize import quantized, weights_to_round
from npo_fast.attacks.relearn import Split, relearned
from npo_fast.data import LossOn, Records, as_rows, check_readable, describe
from npo_fast.distributed import is_main_process
from npo_fast.errors import CannotSaveError, UserError
from npo_fast.evaluation.evaluate import evaluate as evaluate_suite
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import check_forget_quality, tofu_suite, tokenize_suite
from npo_fast.methods import FINETUNE
from npo_fast.metrics import FORGET, retrained_log
from npo_fast.model.save import save_file
from npo_fast.runs.models import Model, ModelSource
from npo_fast.runs.options import RELEARNING, AttackData, ModelOptions
from npo_fast.runs.preflight import check_no_model, check_writable
from npo_fast.runs.progress import ProgressBar, progress
from npo_fast.runs.saving import Saving
from npo_fast.runs.scores import Logs, Scores, logs_of, save_logs
from npo_fast.trainer.loop import check_settings
from npo_fast.trainer.settings import TrainSettings
from npo_fast.validation import check_output, with_checked_keywords

logger = logging.getLogger(__name__)

SUMMARY = "attack.json"


@with_checked_keywords
def attack(
    model: Model,
    *,
    forget: Records = "",
    retain: Records | None = None,
    data: str | Path | None = None,
    loss_on: LossOn = "last",
    retrained: Logs | None = None,
    output: str | Path = "runs/attack",
    overwrite: bool = False,
    tokenizer: Any = None,
    loading: ModelOptions = ModelOptions(),
    attacks: AttackOptions = AttackOptions(),
    training: TrainSettings = RELEARNING,
) -> dict[str, Scores]:
    """Attacks an unlearned model and measures what comes back: ``npo-fast attack``.

    Each attack is taken back after it was measured. No second model is on the device: the weights
    that an attack changes wait in CPU memory.

    Args:
        model: as for ``unlearn``; it is not changed.
        forget: what was forgotten; relearning trains on a part of it, the rest is measured.
        retain: measured too, where it is given.
        loss_on: of a conversation the "last" answer is a record, or "all" are, one each.
        retrained: log of the model trained without the forget set, on all its records.
        output: folder for a folder of logs an attack, and attack.json.
        attacks: which attacks, and how strong.
        training: how to relearn.

    Returns:
        Scores by attack: "before", "relearn", "int8", "int4".

    Raises:
        UserError: something in the input is wrong; the message names the value and the cure.
    """
    forget, retain, folder = as_rows(forget, "forget"), as_rows(retain, "retain"), Path(output)
    log = describe(retrained) if isinstance(retrained, (str, Path)) else None
    inputs = AttackData(
        describe(forget), describe(retain), describe(data), loss_on, log, folder, overwrite
    )
    if forget is None or forget == "":
        raise UserError("say what was forgotten with --forget (a file, or a split of --data)")
    check_no_model(folder)
    check_output(folder, SUMMARY, "an attack", overwrite)
    check_writable(folder, "--output")
    suite = tofu_suite(inputs.data, forget, retain, utility=False, loss_on=loss_on)
    forget_records = suite[FORGET]
    share = attacks.relearn_share if "relearn" in attacks.names else 0.0
    split = Split.of(forget_records, share, training.seed)
    compared = None
    if retrained is not None:
        check_forget_quality(suite)
        logs = logs_of(retrained, "retrained")
        compared = retrained_log(logs, [r.answer for r in forget_records], split.rest)
    source = ModelSource(model, loading, tokenizer)
    source.device()
    template = source.template()
    with source.loaded(offload=training.offload_optimizer) as lm:
        check_readable(
            {"forget": template.encode_all(forget_records)[0]}, lm.vocabulary, lm.positions
        )
        seen = [forget_records[i] for i in split.seen]
        rest = [forget_records[i] for i in split.rest]
        taught = template.encode_all(seen)[0]
        widths = attacks.widths if "quantize" in attacks.names else []
        if "relearn" in attacks.names:  # before anything takes its time
            check_settings(lm, {"train": taught}, FINETUNE, training)
        if widths:
            weights_to_round(lm)
        logger.info(f"{len(seen)} forget records to relearn from, {len(rest)} to measure")
        measured = tokenize_suite(template, {**suite, FORGET: rest})
        tokens = training.micro_batch_tokens
        settings = EvaluationSettings(
            tokens, max_new_tokens=attacks.max_new_tokens, memorization=attacks.memorization
        )
        scores: dict[str, Scores] = {}

        def measure(name: str) -> None:
            with progress(name) as update:
                logs = evaluate_suite(lm, template, measured, settings, update)
            saved = save_logs(logs, folder / name) if is_main_process() else None
            scores[name] = Scores(logs, compared, folder=saved)

        measure("before")
        if "relearn" in attacks.names:
            bar = ProgressBar("relearn")
            with relearned(lm, taught, training, bar.on_step):
                bar.on_end()
                measure("relearn")
        for bits in widths:
            with quantized(lm, bits, attacks.group) as part:
                rounded = f"{part:.1%} of the weights without embedding and head are rounded"
                logger.info(f"int{bits}: {rounded}")
                measure(f"int{bits}")
    groups: dict[str, Any] = {
        "model": source.options, "data": inputs, "attack": attacks, "training": training,
    }  # fmt: skip
    summary = {
        "measures": scores,
        "relearned_records": split.seen,
        "measured_records": split.rest,
        "settings": {name: asdict(group) for name, group in groups.items()},
    }
    text = json.dumps(summary, indent=1, default=str)

    def save_summary(place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        save_file(place / SUMMARY, lambda file: file.write_text(text, encoding="utf-8"))

    if not is_main_process():
        return scores
    try:
        saved = Saving().insist(folder, save_summary)
        logger.info(f"{SUMMARY} saved in {saved}")
    except CannotSaveError as error:
        logger.warning(f"WARNING: NO {SUMMARY} SAVED: {error}")
    return scores
