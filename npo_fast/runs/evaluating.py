"""``evaluate``: TOFU's measures or MUSE's, of a model or of logs that exist already."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npo_fast.data import (
    LossOn,
    Records,
    TokenizedExample,
    as_rows,
    describe,
    repeats,
)
from npo_fast.distributed import is_main_process
from npo_fast.errors import UserError
from npo_fast.evaluation.evaluate import evaluate as evaluate_suite
from npo_fast.evaluation.fluency import generated_columns
from npo_fast.evaluation.harness import Harness, Results
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import (
    Suite,
    check_forget_quality,
    check_rephrased,
    tofu_suite,
    tokenize_suite,
)
from npo_fast.metrics import (
    FORGET,
    HOLDOUT,
    LOG_FILES,
    RETAIN,
    Log,
    LogForm,
    Result,
    check_comparable,
    examples_in,
    has_truth_ratio,
    muse,
)
from npo_fast.metrics.logs import check_answers, right_answers, same_records
from npo_fast.metrics.measures import measures
from npo_fast.metrics.memorization import counted_alike, membership_auc
from npo_fast.metrics.verdict import of_same_records
from npo_fast.model.reference_states import open_reference_states
from npo_fast.runs.chain import Chain, log_records
from npo_fast.runs.models import Model, ModelSource
from npo_fast.runs.muse import SuiteName, check_kind, check_options, check_retrained
from npo_fast.runs.muse import measure as measure_muse
from npo_fast.runs.options import ModelOptions
from npo_fast.runs.output import metadata_of_model
from npo_fast.runs.preflight import check_no_model, check_writable
from npo_fast.runs.progress import SET_NAMES, progress
from npo_fast.runs.references import check_head, load_other
from npo_fast.runs.run import Run
from npo_fast.runs.scores import LM_EVAL, Logs, Scores, logs_of, save_logs
from npo_fast.tables import counted
from npo_fast.validation import check_output, with_checked_keywords

logger = logging.getLogger(__name__)


@with_checked_keywords
def evaluate(
    model: Model | None = None,
    *,
    suite: SuiteName = "tofu",
    forget: Records | None = None,
    retain: Records | None = None,
    data: str | Path | None = None,
    holdout: Records | None = None,
    loss_on: LossOn = "last",
    reference: Model | None = None,
    retrained: Logs | None = None,
    original: Logs | None = None,
    log: Logs | None = None,
    lm_eval: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    log_format: LogForm = "tofu",
    overwrite: bool = False,
    utility: bool = True,
    tokenizer: Any = None,
    loading: ModelOptions = ModelOptions(),
    evaluation: EvaluationSettings = EvaluationSettings(),
) -> Scores:
    """Measures what a model knows, as TOFU does and beyond, or as MUSE: ``npo-fast evaluate``.

    Args:
        model: as for ``unlearn``; it is not changed.
        suite: "tofu", or "muse": its sets are those of ``data``, whose layout is MUSE's.
        forget: what was to be forgotten: a file, a split of ``data`` (``<name>_perturbed`` is taken
            where it lies beside it), or rows.
        retain: what was to be kept.
        data: hub dataset or folder; its real_authors and world_facts join in where ``utility``.
        holdout: records like ``forget`` that no model saw, for the membership attacks.
        loss_on: of a conversation the "last" answer is a record, or "all" are, one each.
        reference: the model before unlearning: KL(reference || model), the membership attack that
            compares losses with its losses, and the perplexity of answers under it.
        retrained: logs of the model trained without the forget set, for the forget quality.
        original: logs of the model before unlearning, for the verdict; else what the run itself
            measured before its first step.
        log: logs to measure instead of running a model.
        lm_eval: tasks of lm-evaluation-harness, as names or a text with commas; a YAML file or a
            folder of them has tasks of your own. ``forget`` and ``retain`` may then be left out.
        output: folder for the log files.
        log_format: form of these files, "tofu" or "open-unlearning"; both are read.

    Raises:
        UserError: something in the input is wrong; the message names the value and the cure.
    """
    folder = None if output is None else Path(output)
    if folder is not None:
        check_no_model(folder)
        for name in (*LOG_FILES, LM_EVAL):
            check_output(folder, name, "logs", overwrite)
        check_writable(folder, "--output")
    elif log_format != "tofu":
        raise UserError("--log-format is the form of files: name their folder with --output")
    compared = None if retrained is None else logs_of(retrained, "retrained")
    earlier = None if original is None else logs_of(original, "original")
    check_kind(compared, "retrained", suite)
    check_kind(earlier, "original", suite)
    if suite == "muse":
        read = {"forget": forget, "retain": retain, "holdout": holdout, "reference": reference,
                "lm_eval": lm_eval}  # fmt: skip
        odd = [name for name, value in read.items() if not _is_left_out(value)]
        odd += ["loss_on"] * (loss_on != "last") + ["utility"] * (not utility)
        odd += ["log_format"] * (log_format != "tofu")
        check_options(odd, loading, evaluation)
    results: Results = {}
    source, asked = None, {}
    if log is not None:
        if lm_eval is not None:
            raise UserError("--lm-eval runs a --model: leave out --log")
        logs = _read_log(log, compared, suite, evaluation)
        given = {"model": model, "forget": forget, "retain": retain, "holdout": holdout,
                 "reference": reference}  # fmt: skip
        if unread := [name for name, value in given.items() if not _is_left_out(value)]:
            raise UserError(f"--log is measured as it is: leave out --{unread[0]}, or --log")
    elif model is None or model == "":
        raise UserError("say which --model to evaluate, or which --log to read")
    elif suite == "muse":
        logs = dict(measure_muse(model, data, compared, tokenizer, loading, evaluation))
    else:
        if forget is None and retain is None and lm_eval is None:
            raise UserError(
                "say what to evaluate on with --forget, --retain or both, or with --suite muse"
            )
        if holdout is not None and forget is None:
            raise UserError("--holdout is compared with --forget: name both")
        _check_options(evaluation, forget, retain, holdout, reference)
        sets = {"forget": forget, "retain": retain, "holdout": holdout}
        rows = {name: as_rows(records, name) for name, records in sets.items()}
        asked = tofu_suite(describe(data), **rows, utility=utility, loss_on=loss_on)
        _check_suite(asked, compared, evaluation)
        harness = None if lm_eval is None else Harness(lm_eval)
        source = ModelSource(model, loading, tokenizer)
        Chain.of(source.metadata).refuse("holdout", asked.get(HOLDOUT, []))
        measured, results = _measure(source, asked, evaluation, reference, harness)
        logs = dict(measured)
    if folder is not None and is_main_process():
        folder = save_logs(logs, folder, log_format, compared, results)
    if source is not None:
        chain, forgotten = Chain.of(source.metadata), asked.get(FORGET, [])
        kept = folder if is_main_process() else None
        log_records(chain, forgotten, source.template(), logs.get(FORGET, {}), kept)
    if suite == "muse":
        before: Mapping[str, Any] = {} if earlier is None else muse.measures(earlier)
    else:
        before = of_same_records(_before(model), logs) if earlier is None else measures(earlier)
    if earlier is not None and not same_records(logs, earlier):
        logger.warning("warning: --original is of other records: the verdict leaves it out")
        before = {}
    return Scores(logs, compared, before, folder, results)


def _read_log(
    log: Logs, retrained: Result | None, suite: SuiteName, evaluation: EvaluationSettings
) -> dict[str, Log]:
    """Logs that exist already, checked against the options and the retrained model's."""
    for name in ("memorization", "min_k_share", "paraphrased_questions", "gradient_norms"):
        if getattr(evaluation, name) != getattr(EvaluationSettings, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is for evaluating a --model; the --log has its own")
    logs = dict(logs_of(log, "log"))
    if not any(logs.values()):
        raise UserError("the log holds nothing to measure")
    check_kind(logs, "log", suite)
    if suite == "muse":
        check_retrained(retrained, logs)
    elif retrained is not None and not has_truth_ratio(logs.get(FORGET, {})):
        raise UserError(
            "--retrained compares truth ratios of the forget set, and the log has none: leave it "
            "out"
        )
    elif retrained is not None:
        ours = logs[FORGET]
        answers: Sequence[str | None] = right_answers(ours) or [None] * examples_in(ours)
        _check_retrained(retrained, answers, examples_in(logs.get(HOLDOUT, {})))
    return logs


def _check_retrained(retrained: Result, answers: Sequence[str | None], held_out: int) -> None:
    """Checks that TOFU's logs of a retrained model are of these forget answers and holdout set."""
    check_comparable(retrained)
    check_answers(retrained[FORGET], answers, "--retrained")
    theirs = examples_in(retrained.get(HOLDOUT, {}))
    if held_out and theirs and theirs != held_out:
        raise UserError(
            f"--retrained has {theirs} holdout items and --holdout {held_out}: evaluate the "
            "retrained model on the same records"
        )
    alike = theirs and counted_alike(retrained, retrained)
    if alike and membership_auc(retrained).get("min-k") == 1:
        logger.warning(
            "warning: --retrained ranks every forget answer above every holdout answer (AUC 1), as "
            "a model does that was trained on them: no privacy leakage is told"
        )


def _check_suite(suite: Suite, retrained: Result | None, evaluation: EvaluationSettings) -> None:
    """Checks TOFU's sets against the options, and tells how large they are and what repeats."""
    if retrained is not None:
        check_forget_quality(suite)
        answers = [record.answer for record in suite[FORGET]]
        _check_retrained(retrained, answers, len(suite.get(HOLDOUT, [])))
    for file, records in suite.items():
        logger.info(f"{SET_NAMES[file]}: {counted(len(records), 'record')}")
    files = {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT}
    for sentence in repeats({name: suite.get(file, []) for name, file in files.items()}):
        logger.warning(f"warning: {sentence}")
    if evaluation.paraphrased_questions:
        check_rephrased(suite)


def _is_left_out(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value)


def _before(model: Model | None) -> Mapping[str, Any]:
    """What the run that made the model measured before its first step."""
    if isinstance(model, Run):
        return model.metadata.get("before") or {}
    if isinstance(model, (str, Path)) and model:
        return metadata_of_model(Path(model)).get("before") or {}
    return {}


def _check_options(evaluation: EvaluationSettings, *sources: Records | Model | None) -> None:
    """Raises ``UserError`` for options that would do nothing without data that is not there."""
    forget, retain, holdout, reference = sources
    if evaluation.gradient_norms and holdout is None:
        raise UserError(
            "--gradient-norms tells --forget from --holdout: name --holdout, or leave it out"
        )
    if reference is not None and forget is None and retain is None:
        raise UserError(
            "--reference is compared on --forget or --retain: name one, or leave it out"
        )


def _measure(
    source: ModelSource,
    suite: Suite,
    settings: EvaluationSettings,
    other: Model | None,
    harness: Harness | None,
) -> tuple[Result, Results]:
    source.device()
    template = source.template()
    tokenized = tokenize_suite(template, suite)
    examples = {name: tokens.answers for name, tokens in tokenized.items()}
    reference = None
    results: Results = {}
    if other is not None:
        other_lm = load_other(other, source, template, examples)
        reference = open_reference_states(
            other_lm, examples, None, "answer", settings.micro_batch_tokens
        )
        del other_lm  # before the next model takes its memory
    with source.loaded() as lm:
        check_head(reference, lm)
        generated: dict[str, list[TokenizedExample]] = {}
        with progress("evaluate") as update:
            logs = evaluate_suite(lm, template, tokenized, settings, update, reference, generated)
        if harness is not None:
            results = harness.run(lm, template.tokenizer, settings.generation_batch)
    if other is not None and settings.generate:
        del lm, reference  # before the reference is loaded again
        answers = {name: generated[name] for name in (FORGET, RETAIN) if generated.get(name)}
        other_lm = load_other(other, source, template, answers)
        for name, generations in answers.items():
            logs[name] |= generated_columns(
                other_lm, generations, examples_in(logs[name]), settings.micro_batch_tokens
            )
    return logs, results
