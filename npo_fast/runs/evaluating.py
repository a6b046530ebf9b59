"""``evaluate``: TOFU's measures or MUSE's, of a model or of logs that exist already."""

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Union

from npo_fast import metrics
from npo_fast.data import (
    LossOn,
    Records,
    as_rows,
    check_vocabulary,
    describe,
    repeats,
)
from npo_fast.errors import CannotSaveError, UserError
from npo_fast.evaluation.evaluate import evaluate as evaluate_suite
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import Suite, check_forget_quality, tofu_suite, tokenize_suite
from npo_fast.metrics import (
    FORGET,
    HOLDOUT,
    LOG_FILES,
    MEASURES,
    RETAIN,
    LogForm,
    Result,
    check_comparable,
    examples_in,
    has_truth_ratio,
    load_result,
    muse,
    save_result,
)
from npo_fast.metrics.evidence import Evidence
from npo_fast.metrics.intervals import intervals
from npo_fast.metrics.logs import same_records
from npo_fast.metrics.measures import Measure, measures
from npo_fast.metrics.verdict import Verdict, judge, of_same_records
from npo_fast.model.adapters import ADAPTER_CONFIG
from npo_fast.model.reference_states import open_reference_states
from npo_fast.runs.chain import Chain, log_records
from npo_fast.runs.models import Model, ModelSource
from npo_fast.runs.muse import SuiteName, check_kind, check_options, check_retrained
from npo_fast.runs.muse import measure as measure_muse
from npo_fast.runs.options import ModelOptions
from npo_fast.runs.output import metadata_of_model
from npo_fast.runs.preflight import check_writable
from npo_fast.runs.progress import progress
from npo_fast.runs.references import check_head, load_other
from npo_fast.runs.run import Run
from npo_fast.runs.saving import Saving
from npo_fast.validation import check_output, with_checked_keywords

logger = logging.getLogger(__name__)

FEW = 10  # records of a set; the interval of an attack on fewer is chance

Logs = Union[str, Path, Run, "Scores", Result]


class Scores(dict[str, float]):
    """Measures by name, such as "model utility"; ``logs`` holds the values of every record.

    Args:
        retrained: logs of the model trained without the forget set.
        before: measures of the model before unlearning, for the verdict; TOFU's are nested.
        folder: where the logs were saved, if they were.
    """

    def __init__(
        self,
        logs: Result,
        retrained: Result | None = None,
        before: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        summary = muse.summary if muse.is_muse(logs) else metrics.summary
        super().__init__(summary(logs, retrained))
        self.logs, self._retrained, self._before = logs, retrained, before or {}
        self.folder = folder

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % bootstrap intervals of measures by name; see ``npo_fast.metrics.intervals``."""
        return {
            self._registry[key].label_of(self.logs): each for key, each in self._between.items()
        }

    @property
    def _registry(self) -> Mapping[str, Measure]:
        return muse.MEASURES if muse.is_muse(self.logs) else MEASURES

    @cached_property
    def _between(self) -> dict[str, tuple[float, float]]:
        return intervals(self.logs, registry=self._registry)

    @cached_property
    def verdict(self) -> Verdict:
        """What came out, with the numbers behind it; see ``npo_fast.metrics.verdict``."""
        if muse.is_muse(self.logs):
            return muse.verdict(self.logs, self._retrained, self._before, self._between)
        attack = "membership_auc.loss"
        few = any(examples_in(self.logs.get(file, {})) < FEW for file in (FORGET, HOLDOUT))
        evidence = Evidence(
            measures(self.logs, self._retrained),
            self._before,
            {} if self._retrained is None else measures(self._retrained),
            {} if few else intervals(self.logs, (attack,)),
            examples_in(self.logs.get(FORGET, {})),
        )
        return judge(evidence)


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
        reference: the model before unlearning, for KL(reference || model).
        retrained: logs of the model trained without the forget set, for the forget quality.
        original: logs of the model before unlearning, for the verdict; else what the run itself
            measured before its first step.
        log: logs to measure instead of running a model.
        output: folder for the log files.
        log_format: form of these files, "tofu" or "open-unlearning"; both are read.

    Raises:
        UserError: something in the input is wrong; the message names the value and the cure.
    """
    folder = None if output is None else Path(output)
    if folder is not None:
        for mark, what in (("run.json", "a run"), ("config.json", "a model"),
                           (ADAPTER_CONFIG, "an adapter")):  # fmt: skip
            if (folder / mark).exists():
                raise UserError(
                    f"--output {folder} holds {what}, of which logs would be a part: name a folder "
                    f"of their own, such as {folder / 'eval'}"
                )
        for name in LOG_FILES:
            check_output(folder, name, "logs", overwrite)
        check_writable(folder, "--output")
    elif log_format != "tofu":
        raise UserError("--log-format is the form of files: name their folder with --output")
    compared = None if retrained is None else logs_of(retrained, "retrained")
    earlier = None if original is None else logs_of(original, "original")
    check_kind(compared, "retrained", suite)
    check_kind(earlier, "original", suite)
    if suite == "muse":
        read = {"forget": forget, "retain": retain, "holdout": holdout, "reference": reference}
        odd = [name for name, value in read.items() if not _is_left_out(value)]
        odd += ["loss_on"] * (loss_on != "last") + ["utility"] * (not utility)
        odd += ["log_format"] * (log_format != "tofu")
        check_options(odd, loading, evaluation)
    asked: tuple[ModelSource, Suite] | None = None
    if log is not None:
        for name in ("memorization", "min_k_share"):
            if getattr(evaluation, name) != getattr(EvaluationSettings, name):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} is for evaluating a --model; the --log has its own")
        given = {"model": model, "forget": forget, "retain": retain, "holdout": holdout}
        if unread := [name for name, value in given.items() if not _is_left_out(value)]:
            raise UserError(f"--log is measured as it is: leave out --{unread[0]}, or --log")
        logs = dict(logs_of(log, "log"))
        if not any(logs.values()):
            raise UserError("the log holds nothing to measure")
        check_kind(logs, "log", suite)
        if suite == "muse":
            check_retrained(compared, logs)
        elif compared is not None and not has_truth_ratio(logs.get(FORGET, {})):
            raise UserError(
                "--retrained compares truth ratios of the forget set, and the log has none: "
                "leave it out"
            )
        elif compared is not None:
            check_comparable(compared)
    elif suite == "muse":
        if model is None or model == "":
            raise UserError("say which --model to evaluate, or which --log to read")
        logs = dict(measure_muse(model, data, compared, tokenizer, loading, evaluation))
    else:
        if model is None or model == "":
            raise UserError("say which --model to evaluate, or which --log to read")
        if forget is None and retain is None:
            raise UserError(
                "say what to evaluate on with --forget, --retain or both, or with --suite muse"
            )
        if holdout is not None and forget is None:
            raise UserError("--holdout is compared with --forget: name both")
        sets = {"forget": forget, "retain": retain, "holdout": holdout}
        rows = {name: as_rows(source, name) for name, source in sets.items()}
        tofu = tofu_suite(describe(data), **rows, utility=utility, loss_on=loss_on)
        if compared is not None:
            check_forget_quality(tofu)
            check_comparable(compared)
        for name, records in tofu.items():
            logger.info(f"{name}: {len(records)} records")
        files = {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT}
        compared_sets = {name: tofu.get(file, []) for name, file in files.items()}
        for sentence in repeats(compared_sets):
            logger.warning(f"warning: {sentence}")
        source = ModelSource(model, loading, tokenizer)
        logs = dict(_measure(source, tofu, evaluation, reference))
        asked = source, tofu
    if folder is not None:
        folder = save_logs(logs, folder, log_format, compared)
    if asked is not None:
        source, tofu = asked
        log_records(Chain.of(source.metadata), tofu.get(FORGET, []), logs.get(FORGET, {}), folder)
    if suite == "muse":
        before: Mapping[str, Any] = {} if earlier is None else muse.measures(earlier)
    else:
        before = of_same_records(_before(model), logs) if earlier is None else measures(earlier)
    if earlier is not None and not same_records(logs, earlier):
        logger.warning("warning: --original is of other records: the verdict leaves it out")
        before = {}
    return Scores(logs, compared, before, folder)


def _is_left_out(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value)


def _before(model: Model | None) -> Mapping[str, Any]:
    """What the run that made the model measured before its first step."""
    if isinstance(model, Run):
        return model.metadata.get("before") or {}
    if isinstance(model, (str, Path)) and model:
        return metadata_of_model(Path(model)).get("before") or {}
    return {}


def save_logs(
    logs: Result, folder: Path, form: LogForm = "tofu", retrained: Result | None = None
) -> Path | None:
    """Saves logs in ``folder``, or in one of the system's; returns where, None for nowhere.

    What was measured is not lost with them: the measures stay in memory.
    """
    try:
        saved = Saving().insist(folder, lambda place: save_result(logs, place, form, retrained))
    except CannotSaveError as error:
        logger.warning(f"WARNING: NO LOGS SAVED: {error}")
        return None
    logger.info(f"logs saved in {saved}")
    return saved


def logs_of(logs: Logs, role: str) -> Result:
    """Evaluation logs by name, of whatever the argument ``role`` may be."""
    if isinstance(logs, (str, Path, Run)):
        return load_result(logs.folder if isinstance(logs, Run) else logs)
    if not isinstance(logs, Mapping):
        raise UserError(f"{role} must be a file, a folder, a run, scores or logs, got {logs!r}")
    return logs.logs if isinstance(logs, Scores) else logs


def _measure(
    source: ModelSource, suite: Suite, settings: EvaluationSettings, other: Model | None
) -> Result:
    source.device()
    template = source.template()
    tokenized = tokenize_suite(template, suite)
    examples = {name: tokens.answers for name, tokens in tokenized.items()}
    reference = None
    if other is not None:
        other_lm = load_other(other, source, template, examples)
        reference = open_reference_states(
            other_lm, examples, None, "answer", settings.micro_batch_tokens
        )
        del other_lm  # before the next model takes its memory
    with source.loaded() as lm:
        check_vocabulary(examples, lm.vocabulary)
        check_head(reference, lm)
        with progress("evaluate") as update:
            return evaluate_suite(lm, template, tokenized, settings, update, reference)
