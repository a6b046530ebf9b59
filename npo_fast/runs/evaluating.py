"""``evaluate``: TOFU's measures and more, of a model or of logs that exist already."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Union

from npo_fast import metrics
from npo_fast.data import (
    LossOn,
    Records,
    Template,
    TokenizedExample,
    as_rows,
    check_vocabulary,
    describe,
    repeats,
)
from npo_fast.errors import CannotSaveError, UserError
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
    MEASURES,
    RETAIN,
    LogForm,
    Result,
    check_comparable,
    examples_in,
    has_truth_ratio,
    load_result,
    save_result,
)
from npo_fast.metrics.intervals import intervals
from npo_fast.metrics.logs import same_records
from npo_fast.metrics.measures import measures
from npo_fast.metrics.verdict import Evidence, Verdict, judge, of_same_records
from npo_fast.model.adapters import ADAPTER_CONFIG
from npo_fast.model.reference_states import open_reference_states
from npo_fast.model.save import save_file
from npo_fast.runs.models import Model, ModelSource
from npo_fast.runs.options import ModelOptions
from npo_fast.runs.output import metadata_of_model
from npo_fast.runs.preflight import check_writable
from npo_fast.runs.progress import progress
from npo_fast.runs.run import Run
from npo_fast.runs.saving import Saving
from npo_fast.validation import check_output, with_checked_keywords

logger = logging.getLogger(__name__)

LM_EVAL = "lm_eval.json"  # results of lm-evaluation-harness, beside the logs
FEW = 10  # records of a set; the interval of an attack on fewer is chance

Logs = Union[str, Path, Run, "Scores", Result]


class Scores(dict[str, float]):
    """Measures by name, such as "model utility"; ``logs`` holds the values of every record.

    Args:
        retrained: logs of the model trained without the forget set.
        before: nested measures of the model before unlearning, for the verdict.
        folder: where the logs were saved, if they were.
        lm_eval: results of lm-evaluation-harness, by task and metric.
    """

    def __init__(
        self,
        logs: Result,
        retrained: Result | None = None,
        before: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        lm_eval: Results | None = None,
    ) -> None:
        super().__init__(metrics.summary(logs, retrained))
        self.lm_eval: Results = lm_eval or {}
        self.logs, self._retrained, self._before = logs, retrained, before or {}
        self.folder = folder

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % bootstrap intervals of measures by name; see ``npo_fast.metrics.intervals``."""
        by_key = intervals(self.logs)
        return {MEASURES[key].label_of(self.logs): each for key, each in by_key.items()}

    @cached_property
    def verdict(self) -> Verdict:
        """What came out, with the numbers behind it; see ``npo_fast.metrics.verdict``."""
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
    """Measures what a model knows, as TOFU does and beyond: ``npo-fast evaluate``.

    Args:
        model: as for ``unlearn``; it is not changed.
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
        for mark, what in (("run.json", "a run"), ("config.json", "a model"),
                           (ADAPTER_CONFIG, "an adapter")):  # fmt: skip
            if (folder / mark).exists():
                raise UserError(
                    f"--output {folder} holds {what}, of which logs would be a part: name a folder "
                    f"of their own, such as {folder / 'eval'}"
                )
        for name in (*LOG_FILES, LM_EVAL):
            check_output(folder, name, "logs", overwrite)
        check_writable(folder, "--output")
    elif log_format != "tofu":
        raise UserError("--log-format is the form of files: name their folder with --output")
    compared = None if retrained is None else logs_of(retrained, "retrained")
    earlier = None if original is None else logs_of(original, "original")
    results: Results = {}
    if log is not None:
        if lm_eval is not None:
            raise UserError("--lm-eval runs a --model: leave out --log")
        for name in ("memorization", "min_k_share", "paraphrased_questions", "gradient_norms"):
            if getattr(evaluation, name) != getattr(EvaluationSettings, name):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} is for evaluating a --model; the --log has its own")
        given = {"model": model, "forget": forget, "retain": retain, "holdout": holdout,
                 "reference": reference}  # fmt: skip
        if unread := [name for name, value in given.items() if not _is_left_out(value)]:
            raise UserError(f"--log is measured as it is: leave out --{unread[0]}, or --log")
        logs = dict(logs_of(log, "log"))
        if not any(logs.values()):
            raise UserError("the log holds nothing to measure")
        if compared is not None and not has_truth_ratio(logs.get(FORGET, {})):
            raise UserError(
                "--retrained compares truth ratios of the forget set, and the log has none: "
                "leave it out"
            )
        if compared is not None:
            check_comparable(compared)
    else:
        if model is None or model == "":
            raise UserError("say which --model to evaluate, or which --log to read")
        if forget is None and retain is None and lm_eval is None:
            raise UserError("say what to evaluate on with --forget, --retain or both")
        if holdout is not None and forget is None:
            raise UserError("--holdout is compared with --forget: name both")
        _check_options(evaluation, forget, retain, holdout, reference)
        sets = {"forget": forget, "retain": retain, "holdout": holdout}
        rows = {name: as_rows(source, name) for name, source in sets.items()}
        suite = tofu_suite(describe(data), **rows, utility=utility, loss_on=loss_on)
        if compared is not None:
            check_forget_quality(suite)
            check_comparable(compared)
        for name, records in suite.items():
            logger.info(f"{name}: {len(records)} records")
        files = {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT}
        compared_sets = {name: suite.get(file, []) for name, file in files.items()}
        for sentence in repeats(compared_sets):
            logger.warning(f"warning: {sentence}")
        if evaluation.paraphrased_questions:
            check_rephrased(suite)
        harness = None if lm_eval is None else Harness(lm_eval)
        source = ModelSource(model, loading, tokenizer)
        measured, results = _measure(source, suite, evaluation, reference, harness)
        logs = dict(measured)
    if folder is not None:
        folder = save_logs(logs, folder, log_format, compared, results)
    before = of_same_records(_before(model), logs) if earlier is None else measures(earlier)
    if earlier is not None and not same_records(logs, earlier):
        logger.warning("warning: --original is of other records: the verdict leaves it out")
        before = {}
    return Scores(logs, compared, before, folder, results)


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


def save_logs(
    logs: Result,
    folder: Path,
    form: LogForm = "tofu",
    retrained: Result | None = None,
    lm_eval: Results | None = None,
) -> Path | None:
    """Saves logs in ``folder``, or in one of the system's; returns where, None for nowhere.

    What was measured is not lost with them: the measures stay in memory.
    """

    def save(place: Path) -> None:
        if logs:
            save_result(logs, place, form, retrained)
        if lm_eval:
            place.mkdir(parents=True, exist_ok=True)
            text = json.dumps(lm_eval, indent=1)
            save_file(place / LM_EVAL, lambda file: file.write_text(text, encoding="utf-8"))
        else:
            (place / LM_EVAL).unlink(missing_ok=True)

    try:
        saved = Saving().insist(folder, save)
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
        other_source = ModelSource(other, replace(source.options, model=""), role="reference")
        _check_tokens(other_source, template, examples)
        other_lm = other_source.load()
        check_vocabulary(examples, other_lm.vocabulary)
        reference = open_reference_states(
            other_lm, examples, None, "answer", settings.micro_batch_tokens
        )
        del other_lm  # before the next model takes its memory
    with source.loaded() as lm:
        check_vocabulary(examples, lm.vocabulary)
        if reference is not None and len(reference.head.weight) != len(lm.head.weight):
            raise UserError(
                f"--reference predicts {len(reference.head.weight)} tokens and the model "
                f"{len(lm.head.weight)}: KL compares models with the same tokens"
            )
        generated: dict[str, list[TokenizedExample]] = {}
        with progress("evaluate") as update:
            logs = evaluate_suite(lm, template, tokenized, settings, update, reference, generated)
        if harness is not None:
            results = harness.run(lm, template.tokenizer, settings.generation_batch)
    if other is not None and settings.generate:
        del lm, reference  # before the reference is loaded again
        answers = {name: generated[name] for name in (FORGET, RETAIN) if generated.get(name)}
        other_lm = other_source.load()
        for name, generations in answers.items():
            logs[name] |= generated_columns(
                other_lm, generations, examples_in(logs[name]), settings.micro_batch_tokens
            )
    return logs, results


def _check_tokens(
    reference: ModelSource, template: Template, examples: Mapping[str, list[TokenizedExample]]
) -> None:
    """Checks that the tokens mean the same to both models, as far as the reference can tell."""
    try:
        other = reference.template().tokenizer
    except UserError:
        return  # a folder with weights alone
    used = sorted({i for each in examples.values() for example in each for i in example.input_ids})
    ours, theirs = (t.convert_ids_to_tokens(used) for t in (template.tokenizer, other))
    for token, expected, actual in zip(used, ours, theirs, strict=True):
        if expected != actual:
            raise UserError(
                f"--reference {reference.options.model} has another vocabulary than the model: "
                f"its token {token} is {actual!r}, not {expected!r}, and KL compares models with "
                "the same tokens"
            )
