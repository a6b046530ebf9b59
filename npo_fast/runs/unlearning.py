"""``unlearn``: a method of ``npo_fast.methods`` on a forget and a retain set."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from npo_fast.data import (
    Record,
    Records,
    Template,
    alternated,
    as_rows,
    describe,
    load_records,
    load_refusals,
    refused,
)
from npo_fast.distributed import world_size
from npo_fast.errors import UserError
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import Suite, check_forget_quality, tofu_suite, tokenize_suite
from npo_fast.methods import METHODS, Term, build_method
from npo_fast.metrics import FORGET, Result, probability, retrained_log, rouge_l_recall
from npo_fast.model.causal_lm import CausalLM
from npo_fast.runs.callbacks import Callback, EvaluationCallback
from npo_fast.runs.models import Model, ModelSource
from npo_fast.runs.options import (
    EvaluationOptions,
    MethodOptions,
    ModelOptions,
    ReportOptions,
    RunOptions,
    UnlearnData,
)
from npo_fast.runs.progress import ProgressBar, progress
from npo_fast.runs.resume import ResumableRun
from npo_fast.runs.run import Run
from npo_fast.runs.tokens import TokenizedData, describe_run, tokenize_sources
from npo_fast.runs.training import ReferenceData, check_fit, find_resumable, run_training
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.step import References

logger = logging.getLogger(__name__)


def unlearn(
    model: Model,
    *,
    forget: Records,
    retain: Records | None = None,
    method: str | MethodOptions | tuple[Term, ...] = "NPO+RT",
    output: str | Path | None = None,
    data: str | None = None,
    idk: str | Path | None = None,
    alternate: str | None = None,
    tokenizer: Any = None,
    loading: ModelOptions = ModelOptions(),
    training: TrainSettings = TrainSettings(),
    report: ReportOptions = ReportOptions(),
    evaluation: EvaluationOptions = EvaluationOptions(),
    run: RunOptions = RunOptions(),
    callbacks: Iterable[Callback] = (),
) -> Run:
    """Makes a model forget one set of records and keep another: ``npo-fast unlearn``.

    The same call goes on with a run in ``output`` that was interrupted.

    Args:
        model: hub name, folder, GGUF file, run, transformers model or ``CausalLM``; a model in
            memory is trained in place.
        forget: what to forget: a file, a split of ``data``, rows or a ``datasets.Dataset``.
        retain: what to keep, in the same forms; methods with +RT need it.
        method: a name in ``npo_fast.methods.METHODS``, with its coefficients in
            ``MethodOptions``, or terms of your own.
        output: the run folder; else that of ``run``.
        data: hub dataset or folder that ``forget`` and ``retain`` are splits of.
        idk: file of refusals, one a line, for IDK, DPO and KTO.
        alternate: file or split with AltPO's answers to the forget questions.
        tokenizer: of a model in memory.
        loading: how the model is loaded, and how text becomes tokens.
        callbacks: hear of every step, evaluation and checkpoint, and may stop the run.

    Raises:
        UserError: something in the input is wrong; the message names the value and the cure.
        NonFiniteError: a loss or gradient became NaN or infinite.
        OutOfMemory: one sequence alone does not fit.
        Interrupted: Ctrl-C or SIGTERM, after the step and with a checkpoint.
    """
    options = run if output is None else replace(run, output=Path(output))
    source = ModelSource(model, loading, tokenizer)
    forget, retain = as_rows(forget), None if retain is None else as_rows(retain)
    if forget == "":
        raise UserError("say what to forget with --forget (a file, or a split of --data)")
    method, terms = _resolve(method)
    wanted = {source for term in terms for source in term.reads}
    if retain is None and "retain" in wanted:
        raise UserError(f"{method.method} keeps what --retain names; name it, or use NPO")
    for answers, value in (("idk", idk), ("alternate", alternate)):
        if value is not None and answers not in wanted:
            raise UserError(f"{method.method} reads no such answers; leave out --{answers}")
    source.options.check_training()
    options.check(source.options)
    suite = _evaluation_suite(evaluation, data, forget, retain)
    records = {"forget": load_records(forget, data, "forget")}
    if retain is not None:
        records["retain"] = load_records(retain, data, "retain")
    answers_too = dict(records)
    if "idk" in wanted:
        refusals = load_refusals(None if idk is None else Path(idk), data)
        answers_too["idk"] = refused(records["forget"], refusals, training.seed)
    if "alternate" in wanted:
        answers_too["alternate"] = alternated(records["forget"], training.seed, alternate, data)
    inputs = UnlearnData(
        describe(forget),
        None if retain is None else describe(retain),
        data,
        None if idk is None else Path(idk),
        alternate,
    )
    names = {"idk": "refusals", "alternate": "alternate answers"}
    names |= {name: str(value) for name, value in vars(inputs).items() if value}
    tokens = tokenize_sources(answers_too, names, source.template(), terms, training)
    settings = {
        "model": source.options, "data": inputs, "method": method, "training": training,
        "report": report, "watch": evaluation, "run": options,
    }  # fmt: skip
    metadata = describe_run("unlearn", settings, tokens)
    if method.method not in METHODS:
        metadata["terms"] = [repr(term) for term in terms]  # so that other ones do not resume
    resumable = find_resumable(options, metadata, source.in_memory is not None)
    if options.dry_run:
        return Run.planned(options.output, metadata)

    with source.loaded(resumable) as lm:
        check_fit(lm, tokens, terms, training)
        sample = _Sample(lm, tokens.template, records, report)
        if resumable is None:
            before = sample.answer("before")
            log_probs: References = reference_log_probs(
                lm, tokens.sources, terms, training.micro_batch_tokens
            )
        else:
            before = resumable.metadata.get("before", {})
            log_probs = _resumed_log_probs(lm, resumable, tokens, terms, training)
        hidden = reference_cache_for(
            terms, lm, tokens.sources, training.micro_batch_tokens, method.reference_cache
        )
        run_training(
            lm, tokens, terms, training, options, metadata,
            resumable=resumable,
            reference=ReferenceData(before, log_probs, hidden),
            evaluation=_evaluation_callback(lm, tokens.template, evaluation, report, suite),
            callbacks=[ProgressBar(options.output.name), *callbacks],
            report=lambda: {"after": after} if (after := sample.answer("after")) else {},
        )  # fmt: skip
    return Run(options.output, lm.model, tokens.template.tokenizer)


def _resolve(
    method: str | MethodOptions | tuple[Term, ...],
) -> tuple[MethodOptions, tuple[Term, ...]]:
    """The options of a method and its terms."""
    if isinstance(method, (tuple, list)) and all(isinstance(term, Term) for term in method):
        method = tuple(method)
        return MethodOptions(" + ".join(term.name for term in method)), method
    if not isinstance(method, (str, MethodOptions)):
        raise UserError(f"method must be a name, MethodOptions or terms, got {method!r}")
    options = MethodOptions(method) if isinstance(method, str) else method
    terms = build_method(options.method, options.coefficients(), options.kl_positions)
    if options.reference_cache is not None and all(t.loss.reference != "hidden" for t in terms):
        raise UserError(
            f"{options.method} compares with no hidden states; leave out --reference-cache"
        )
    return options, terms


def _resumed_log_probs(
    lm: CausalLM,
    resumable: ResumableRun,
    tokens: TokenizedData,
    terms: tuple[Term, ...],
    training: TrainSettings,
) -> References:
    """The reference log-probs that the folder kept; made again where none are needed, or lost."""
    if resumable.references or resumable.trained:
        return dict(resumable.references or {})
    compares = any(term.loss.reference in ("sequence", "token") for term in terms)
    if world_size() > 1 and compares:
        raise UserError(  # sharded models have the weights of the checkpoint by now
            f"the reference's log-probs in {resumable.folder} are lost: go on with one process, "
            "which makes them again"
        )
    return reference_log_probs(lm, tokens.sources, terms, training.micro_batch_tokens)


def _evaluation_suite(
    options: EvaluationOptions, data: str | None, forget: Records, retain: Records | None
) -> tuple[Suite, Result | None] | None:
    """The records to evaluate while training, and the retrained model's log of the same."""
    if not options.eval_every:
        return None
    if world_size() > 1:
        raise UserError(f"--eval-every answers questions on one process, not on {world_size()}")
    suite = tofu_suite(data, forget, retain)
    records = {name: rows[: options.eval_records] for name, rows in suite.items()}
    if options.retrained is None:
        return records, None
    check_forget_quality(suite)
    examples = range(len(records[FORGET]))
    return records, retrained_log(options.retrained, len(suite[FORGET]), examples)


def _evaluation_callback(
    lm: CausalLM,
    template: Template,
    options: EvaluationOptions,
    report: ReportOptions,
    suite: tuple[Suite, Result | None] | None,
) -> EvaluationCallback | None:
    if suite is None:
        return None
    records, retrained = suite
    settings = EvaluationSettings(max_new_tokens=report.max_new_tokens)
    tokenized = tokenize_suite(template, records)
    return EvaluationCallback(
        options, lambda: evaluate(lm, template, tokenized, settings), retrained
    )


class _Sample:
    """The first records of each set, which the report answers before and after."""

    def __init__(
        self,
        lm: CausalLM,
        template: Template,
        records: Mapping[str, list[Record]],
        options: ReportOptions,
    ) -> None:
        self.lm, self.template, self.options = lm, template, options
        self.records = {
            name: [Record(row.messages, row.answer) for row in rows[: options.report_records]]
            for name, rows in records.items()
        }

    def answer(self, when: str) -> dict[str, Any]:
        """Probability, ROUGE-L and answers by set; empty where the options want no report."""
        if self.options.no_report or self.options.report_records < 1:
            return {}
        if world_size() > 1:
            if when == "after":
                logger.info("no answers in the report: npo-fast evaluate makes them on one process")
            return {}
        settings = EvaluationSettings(max_new_tokens=self.options.max_new_tokens)
        with progress(when) as update:
            logs = evaluate(self.lm, self.template, self.records, settings, update)
        return {
            name: {
                "probability": float(probability(log).mean()),
                "rouge_l_recall": float(np.mean(rouge_l_recall(log))),
                "answers": [
                    {"question": record.question, "answer": text, "truth": record.answer}
                    for record, (_, text, _) in zip(
                        self.records[name], log["generated_text"], strict=True
                    )
                ],
            }
            for name, log in logs.items()
        }
