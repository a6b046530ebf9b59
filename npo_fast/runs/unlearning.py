"""``unlearn``: a method of ``npo_fast.methods`` on a forget and a retain set."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from npo_fast.data import (
    LossOn,
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
from npo_fast.errors import UserError
from npo_fast.evaluation.evaluate import evaluate
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import (
    Suite,
    check_forget_quality,
    tofu_suite,
    tokenize_set,
    tokenize_suite,
)
from npo_fast.methods import Term, build_method
from npo_fast.metrics import FORGET, SETS, Result, retrained_log
from npo_fast.metrics.evidence import Evidence
from npo_fast.metrics.measures import measures, without_end
from npo_fast.metrics.verdict import ADVICE, judge, unknown_before
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.reference_log_probs import check_cache
from npo_fast.runs.callbacks import Callback, EvaluationCallback
from npo_fast.runs.folder import RunFolder
from npo_fast.runs.models import Model, ModelSource, name_of
from npo_fast.runs.options import (
    EvaluationOptions,
    MethodOptions,
    ModelOptions,
    ReportOptions,
    RunOptions,
    UnlearnData,
)
from npo_fast.runs.own_answers import AUTO, own_answers
from npo_fast.runs.padding import padded_weights
from npo_fast.runs.preparing import PreparedRun, prepare_run
from npo_fast.runs.progress import progress
from npo_fast.runs.references import (
    check_head,
    reference_model,
    references_under,
    run_references,
)
from npo_fast.runs.run import Run
from npo_fast.runs.training import ReferenceData, run_training, with_enough_memory
from npo_fast.runs.unknown import UnknownSources, check_holdout, median_log_prob, with_level
from npo_fast.trainer.settings import TrainSettings
from npo_fast.validation import with_checked_keywords

logger = logging.getLogger(__name__)


@with_checked_keywords
def unlearn(
    model: Model,
    *,
    forget: Records,
    retain: Records | None = None,
    method: str | MethodOptions | tuple[Term, ...] = "NPO+RT",
    output: str | Path | None = None,
    data: str | Path | None = None,
    idk: str | Path | None = None,
    alternate: str | Path | None = None,
    holdout: Records | None = None,
    base_model: Model | None = None,
    unknown_log_prob: float | None = None,
    loss_on: LossOn = "last",
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
        forget: what to forget: a file or folder, a split of ``data``, or rows (``docs/data.md``).
        retain: what to keep, in the same forms; methods with +RT need it. "auto": the model's own
            answers to neutral prompts (``docs/retain_auto.md``).
        method: a name in ``npo_fast.methods.METHODS``, with its coefficients in
            ``MethodOptions``, or terms of your own.
        output: the run folder; else that of ``run``.
        data: hub dataset or folder that ``forget`` and ``retain`` are splits of.
        idk: file of refusals, one a line, for IDK, DPO and KTO.
        alternate: file or split with AltPO's answers to the forget questions.
        holdout: records like ``forget`` that the model never saw, in the same forms. For
            ``beta="auto"`` and the verdict, as are the next two and ``evaluation.retrained``: they
            tell how likely the forget answers are to a model that never knew them
            (``npo_fast.suggest_beta``). The first that is given decides, ``retrained`` first.
        base_model: the model before it was taught.
        unknown_log_prob: the median log-prob of a whole forget answer there, in nats.
        loss_on: of a conversation the "last" answer is a record, or "all" are, one each.
        tokenizer: of a model in memory.
        loading: how the model is loaded, and how text becomes tokens.
        callbacks: hear of every step, evaluation and checkpoint, and may stop the run.

    Raises:
        UserError: something in the input is wrong; the message names the value and the cure.
        NonFiniteError: a loss or gradient became NaN or infinite.
        OutOfMemory: one sequence alone does not fit.
        Interrupted: Ctrl-C or SIGTERM, after the step and with a checkpoint.
    """
    source = ModelSource(model, loading, tokenizer)
    options = run if output is None else replace(run, output=Path(output))
    options = options.after_restart()
    forget, retain = as_rows(forget, "forget"), as_rows(retain, "retain")
    holdout = as_rows(holdout, "holdout")
    inputs = UnlearnData(
        describe(forget), describe(retain), describe(data), describe(idk), describe(alternate),
        describe(holdout), None if base_model is None else name_of(base_model), unknown_log_prob,
        loss_on,
    )  # fmt: skip
    method, terms = _resolve(method)
    level_from = UnknownSources(evaluation.retrained, holdout, base_model, unknown_log_prob)
    level_from.check(method, terms)
    if evaluation.retrained is not None and not evaluation.eval_every and not method.auto_beta:
        raise UserError("--retrained is compared at evaluations: add --eval-every STEPS")
    needed = {source for term in terms for source in term.reads}
    if forget == "":
        raise UserError("say what to forget with --forget (a file, or a split of --data)")
    if retain is None and "retain" in needed:
        raise UserError(
            f"{method.method} keeps what --retain names; name it, take the model's own answers "
            f"(--retain {AUTO}), or use NPO"
        )
    if retain == AUTO and "retain" not in needed:
        raise UserError(f"{method.method} reads no retain data; leave out --retain {AUTO}")
    for answers in ("idk", "alternate"):
        if getattr(inputs, answers) is not None and answers not in needed:
            raise UserError(f"{method.method} reads no such answers; leave out --{answers}")
    options.check(
        source.options, forget=inputs.forget, retain=inputs.retain, data=inputs.data,
        idk=inputs.idk, alternate=inputs.alternate, holdout=inputs.holdout,
        base_model=inputs.base_model, reference=method.reference, retrained=evaluation.retrained,
    )  # fmt: skip

    records = {"forget": load_records(forget, inputs.data, "forget", loss_on)}
    if retain == AUTO:
        # without an adapter: what answers is the model before the run
        asked = ModelSource(model, replace(loading, lora_rank=0, lora_alpha=None), tokenizer)
        retain, keep = own_answers(asked, records["forget"], options)
        callbacks = [*callbacks, keep]
    if retain is not None:
        records["retain"] = load_records(retain, inputs.data, "retain", loss_on)
    sampled = dict(records)
    if holdout is not None:
        records["holdout"] = load_records(holdout, inputs.data, "holdout", loss_on)
        check_holdout(records)
    if "idk" in needed:
        refusals = load_refusals(inputs.idk, inputs.data)
        records["idk"] = refused(records["forget"], refusals, training.seed)
    if "alternate" in needed:
        records["alternate"] = alternated(
            records["forget"], training.seed, inputs.alternate, inputs.data, loss_on
        )
    names = {"idk": "refusals", "alternate": "alternate answers"}
    names |= {name: str(value) for name, value in vars(inputs).items() if value}
    settings = {
        "model": source.options, "data": inputs, "method": method, "training": training,
        "report": report, "watch": evaluation, "run": options,
    }  # fmt: skip
    prepared = prepare_run("unlearn", source, records, names, terms, settings, callbacks)
    for line in padded_weights(terms, prepared.sources, training):
        logger.info(line)
    suite = {}
    if evaluation.eval_every:
        suite = tofu_suite(inputs.data, forget, retain, loss_on=loss_on)
    watch = _evaluation_callback(prepared, evaluation, report, suite)
    other = reference_model(method.reference, prepared)
    level_from.check_sources(prepared, records["forget"])
    if options.dry_run:
        return Run.planned(options.output, prepared.metadata)

    under_base = level_from.under_base(prepared)

    def run_once(prepared: PreparedRun) -> Run:
        references = None if other is None else references_under(other, prepared, method)
        with prepared.loaded() as lm:

            def answers_now(when: str) -> dict[str, Any]:
                return _answers(lm, prepared.template, sampled, report, when)

            def closing(folder: RunFolder) -> dict[str, Any]:
                after = answers_now("after")
                now = None if level is None else median_log_prob(lm, prepared)
                verdict = judge(replace(_evidence(folder, after, watch), level=level, log_prob=now))
                return {**({"after": after} if after else {}), "verdict": asdict(verdict)}

            level = None
            before = {} if prepared.resumable else answers_now("before")
            if unknown := unknown_before(before):
                logger.warning(f"warning: {unknown}; {ADVICE['nothing to forget']}")
            log_probs, hidden = references or run_references(lm, prepared, method.reference_cache)
            check_head(hidden, lm, prepared.terms)
            if level_from.given:
                level = level_from.level(lm, prepared, log_probs, under_base)
                prepared = with_level(prepared, level, method.auto_beta)
            reference = ReferenceData(before, log_probs, hidden)
            return run_training(lm, prepared, reference, watch, closing)

    return with_enough_memory(prepared, run_once)


def _resolve(
    method: str | MethodOptions | tuple[Term, ...],
) -> tuple[MethodOptions, tuple[Term, ...]]:
    """The options of a method and its terms."""
    if isinstance(method, (tuple, list)) and method and all(isinstance(t, Term) for t in method):
        method = tuple(method)
        return MethodOptions(" + ".join(term.name for term in method)), method
    if not isinstance(method, (str, MethodOptions)):
        raise UserError(f"method must be a name, MethodOptions or terms, got {method!r}")
    options = MethodOptions(method) if isinstance(method, str) else method
    terms = build_method(
        options.method, options.coefficients(), options.kl_positions, options.preset
    )
    for name in ("reference", "reference_cache"):
        if getattr(options, name) is not None and not any(term.loss.reference for term in terms):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{options.method} compares with no reference; leave out {flag}")
    if options.reference_cache is None:
        return options, terms
    check_cache(options.reference_cache)
    return options, terms


def _evaluation_callback(
    prepared: PreparedRun, options: EvaluationOptions, report: ReportOptions, suite: Suite
) -> EvaluationCallback | None:
    """Evaluates the first records of each set of ``suite``, if there is any."""
    if not suite:
        return None
    first = {name: rows[: options.eval_records] for name, rows in suite.items()}
    retrained = None
    if options.retrained is not None:
        check_forget_quality(suite)
        examples = range(len(first[FORGET]))
        answers = [record.answer for record in suite[FORGET]]
        retrained = retrained_log(options.retrained, answers, examples)
    tokenized = tokenize_suite(prepared.template, first)
    settings = EvaluationSettings(
        max_new_tokens=report.max_new_tokens, memorization=options.memorization
    )

    def measure(lm: CausalLM) -> Result:
        with progress("evaluation") as update:
            return evaluate(lm, prepared.template, tokenized, settings, update)

    return EvaluationCallback(options, measure, retrained)


def _evidence(
    folder: RunFolder, after: Mapping[str, Any], watch: EvaluationCallback | None
) -> Evidence:
    """What the run measured: its evaluations where it made any, else the short report."""
    evaluations = folder.evaluations()
    if watch is None or len(evaluations) < 2:
        answers = after.get("forget", {}).get("answers", ())
        return Evidence(after, folder.metadata.get("before", {}), records=len(answers))
    retrained = {} if watch.retrained is None else measures(watch.retrained)
    best = folder.metadata.get("best", evaluations[-1])
    records = min(watch.options.eval_records, folder.metadata["data"]["forget"]["records"])
    return Evidence(best, evaluations[0], retrained, records=records)


def _answers(
    lm: CausalLM,
    template: Template,
    records: Mapping[str, list[Record]],
    options: ReportOptions,
    when: str,
) -> dict[str, Any]:
    """Probability, ROUGE-L and answers of the first records of each set, "before" or "after"."""
    if options.no_report or options.report_records < 1:
        return {}
    count = options.report_records
    first = {
        name: tokenize_set(template, name, rows[:count]).first(count)
        for name, rows in records.items()
    }
    settings = EvaluationSettings(max_new_tokens=options.max_new_tokens)
    with progress(when) as update:
        logs = evaluate(lm, template, first, settings, update)
    scores = measures({SETS[name]: log for name, log in logs.items()})
    return {
        name: {
            **scores[name],
            **({"without_end": without_end(log)} if "ending" in log else {}),
            "answers": [
                {"question": record.question or prompt, "answer": text, "truth": truth}
                for record, (prompt, text, truth) in zip(
                    first[name].records, log["generated_text"], strict=True
                )
            ],
        }
        for name, log in logs.items()
    }
