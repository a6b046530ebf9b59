"""``npo-fast unlearn``: a method of ``npo_fast.methods`` on a forget and a retain set."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from npo_fast.cli.console import number, progress, say, show, table
from npo_fast.cli.prepare import prepare, run_facts
from npo_fast.cli.training import (
    ModelOptions,
    Origin,
    RunOptions,
    check_fit,
    run_training,
)
from npo_fast.data import Record, alternated, load_records, load_refusals, refused
from npo_fast.distributed import world_size
from npo_fast.errors import UserError
from npo_fast.evaluation.course import Course, WatchOptions
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import Suite, check_forget_quality, tofu_suite
from npo_fast.methods import Coefficients, Term, build_method
from npo_fast.metrics import FORGET, Result, probability, retrained_log, rouge_l_recall
from npo_fast.metrics.measures import value_of
from npo_fast.trainer.settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor

    from npo_fast.model.causal_lm import CausalLM


@dataclass(frozen=True)
class DataOptions:
    """What to forget and what to keep."""

    forget: str = ""
    """A file, or a split of --data; either may end in a slice such as [-40:]."""
    retain: str | None = None
    """The same for what to keep; methods with +RT need it."""
    data: str | None = None
    """Hub dataset (locuslab/TOFU) or folder that --forget and --retain are splits of."""
    idk: Path | None = None
    """Refusals, one a line, for IDK, DPO and KTO; else idontknow.jsonl of --data, or our own."""
    alternate: str | None = None
    """AltPO's answers: a file or split with the forget questions; else their "alternate" field."""

    def load(self) -> dict[str, list[Record]]:
        if not self.forget:
            raise UserError("say what to forget with --forget (a file, or a split of --data)")
        records = {"forget": load_records(self.forget, self.data)}
        if self.retain is not None:
            records["retain"] = load_records(self.retain, self.data)
        return records

    def load_answers(
        self, forget: list[Record], wanted: set[str], seed: int
    ) -> dict[str, list[Record]]:
        """Other answers to the forget questions, where they are ``wanted``."""
        answers = {}
        if "idk" in wanted:
            answers["idk"] = refused(forget, load_refusals(self.idk, self.data), seed)
        if "alternate" in wanted:
            answers["alternate"] = alternated(forget, seed, self.alternate, self.data)
        return answers

    def named(self) -> dict[str, str]:
        """What the user knows each source as."""
        return {
            "forget": self.forget,
            "retain": self.retain or "",
            "idk": str(self.idk or "refusals"),
            "alternate": self.alternate or "alternate answers",
        }


@dataclass(frozen=True)
class MethodOptions:
    """How to forget."""

    method: str = "NPO+RT"
    """GA, NPO, DPO, KTO, SimNPO, TNPO, WGA, SatImp, CEU, AltPO, UNDIAL, each also with
    +RT; IDK+RT; GA, NPO, DPO and KTO with +KL; GA+forgetKL."""
    beta: float | None = None
    """Inverse temperature (WGA: exponent); else 0.1, SimNPO 2.5, WGA 1."""
    delta: float | None = None
    """SimNPO's margin; else 0."""
    beta1: float | None = None
    """SatImp's exponent of p; else 5."""
    beta2: float | None = None
    """SatImp's exponent of 1 - p; else 1."""
    gamma: float | None = None
    """UNDIAL's strength, in nats; else 10."""
    forget_coefficient: float | None = None
    """Of the forget term; else 1."""
    retain_coefficient: float | None = None
    """Of the retain term; else 1. The paper takes 5 to forget half and 12 to forget 90 percent."""
    kl_coefficient: float | None = None
    """Of the KL to the model as it was; else 1."""
    kl_positions: Literal["answer", "all"] = "answer"
    """Tokens that the KL is averaged over; "all" has the prompts too, as the paper's code;
    that also counts padding, which packs do not have."""
    reference_cache: Path | None = None
    """Folder that keeps the reference's hidden states for KL and UNDIAL from run to run."""

    def coefficients(self) -> Coefficients:
        return Coefficients(
            beta=self.beta,
            delta=self.delta,
            beta1=self.beta1,
            beta2=self.beta2,
            gamma=self.gamma,
            kl=self.kl_coefficient,
            forget=self.forget_coefficient,
            retain=self.retain_coefficient,
        )


@dataclass(frozen=True)
class ReportOptions:
    """A short look at the model before and after; ``npo-fast evaluate`` measures in full."""

    no_report: bool = False
    report_records: int = 20
    """Records of each set to answer before and after."""
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.report_records < 0:
            raise UserError(f"report_records must be 0 or more, got {self.report_records}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


@dataclass(frozen=True)
class Command:
    model: ModelOptions
    data: DataOptions = field(default_factory=DataOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    training: TrainSettings = field(default_factory=TrainSettings)
    report: ReportOptions = field(default_factory=ReportOptions)
    watch: WatchOptions = field(default_factory=WatchOptions)
    run: RunOptions = field(default_factory=RunOptions)


def run(command: Command) -> None:
    method = command.method
    terms = build_method(method.method, method.coefficients(), method.kl_positions)
    wanted: set[str] = {source for term in terms for source in term.reads}
    data = command.data
    if data.retain is None and "retain" in wanted:
        raise UserError(f"{method.method} keeps what --retain names; name it, or use NPO")
    for source, flag in (("idk", data.idk), ("alternate", data.alternate)):
        if flag is not None and source not in wanted:
            raise UserError(f"{method.method} reads no such answers; leave out --{source}")
    if method.reference_cache is not None and all(t.loss.reference != "hidden" for t in terms):
        raise UserError(
            f"{method.method} compares with no hidden states; leave out --reference-cache"
        )
    command.run.check(command.model)
    watched = _watched(command)
    records = data.load()
    answers = data.load_answers(records["forget"], wanted, command.training.seed)
    prepared = prepare(command.model, command.training, {**records, **answers}, data.named(), terms)
    earlier = command.run.unfinished(run_facts(command, "unlearn", prepared))
    if command.run.dry_run:
        show({"dry_run": True, **prepared.facts()}, "dry run: all is well", command.run.json)
        return

    from npo_fast.trainer.loop import reference_log_probs
    from npo_fast.trainer.reference_cache import reference_cache_for

    lm = command.model.load_model(earlier)
    check_fit(lm, prepared, terms, command.training)
    look = _Look(command.report, lm, prepared.template, records)
    course = _course(command, lm, prepared.template, *watched) if watched else None
    tokens = command.training.micro_batch_tokens
    if earlier is None:
        before = look.take("before")
        references = reference_log_probs(lm, prepared.sources, terms, tokens)
    else:
        before = earlier.facts.get("before", {})
        references = dict(earlier.references or {})
        if not (references or earlier.trained):  # none are needed, or they were lost
            references = _references_again(command, lm, prepared.sources, terms)
    cache = reference_cache_for(terms, lm, prepared.sources, tokens, method.reference_cache)
    after: dict[str, Any] = {}

    def report() -> Mapping[str, Any]:
        after.update(look.take("after"))
        return {"after": after} if after else {}

    origin = Origin(before, references, cache)
    facts = run_training(command, "unlearn", prepared, lm, terms, earlier, origin, report, course)
    say()
    show(
        {"output": str(command.run.output), **facts},
        _text(before, after) + f"\n{_chosen(command, facts)} {command.run.output / 'model'}",
        command.run.json,
    )


def _references_again(
    command: Command, lm: "CausalLM", sources: Mapping[str, Any], terms: tuple[Term, ...]
) -> "dict[str, Tensor | list[Tensor]]":
    from npo_fast.trainer.loop import reference_log_probs

    if world_size() > 1 and any(term.loss.reference in ("sequence", "token") for term in terms):
        raise UserError(  # ranks that divide a model have the weights of the checkpoint by now
            f"the reference's log-probs in {command.run.output} are lost: go on with one process, "
            "which makes them again"
        )
    return reference_log_probs(lm, sources, terms, command.training.micro_batch_tokens)


def _watched(command: Command) -> tuple[Suite, Result | None] | None:
    """The records to measure while training, and the retrained model's log of the same ones."""
    options, data = command.watch, command.data
    if not options.eval_every:
        return None
    if world_size() > 1:
        raise UserError(f"--eval-every answers questions on one process, not on {world_size()}")
    suite = tofu_suite(data.data, data.forget, data.retain)
    kept = {name: records[: options.eval_records] for name, records in suite.items()}
    if options.retrained is None:
        return kept, None
    check_forget_quality(suite)
    examples = range(len(kept[FORGET]))
    return kept, retrained_log(options.retrained, len(suite[FORGET]), examples)


def _course(
    command: Command, lm: Any, template: Any, suite: Suite, retrained: Result | None
) -> Course:
    from npo_fast.evaluation.evaluate import evaluate

    settings = EvaluationSettings(max_new_tokens=command.report.max_new_tokens)
    return Course(command.watch, lambda: evaluate(lm, template, suite, settings), retrained)


def _chosen(command: Command, facts: Mapping[str, Any]) -> str:
    measure = command.watch.keep_best
    if measure is None:
        return "the model is in"
    if "best" not in facts:
        share = command.watch.min_utility
        return f"no evaluation kept {share:.0%} of the utility; the model after the last step is in"
    best = facts["best"]
    value = number(value_of(best, measure))
    return f"the model of step {best['step']}, the best by {measure} ({value}), is in"


class _Look:
    """Probability, ROUGE and answers on the first records of each set."""

    def __init__(
        self, options: ReportOptions, lm: Any, template: Any, records: dict[str, list[Record]]
    ) -> None:
        self.options, self.lm, self.template = options, lm, template
        self.records = {
            name: [Record(r.messages, r.answer) for r in all_[: options.report_records]]
            for name, all_ in records.items()
        }

    def take(self, when: str) -> dict[str, Any]:
        if self.options.no_report or self.options.report_records < 1:
            return {}
        if world_size() > 1:
            if when == "after":
                say("no look at the answers: npo-fast evaluate takes one, on one process")
            return {}
        from npo_fast.evaluation.evaluate import evaluate

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


def _text(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if not after:
        return ""
    rows = [
        [name, measure, number(before[name][key]), number(after[name][key])]
        for name in before
        for measure, key in (("probability", "probability"), ("ROUGE-L", "rouge_l_recall"))
    ]
    lines = [table(rows, ("set", "measure", "before", "after"))]
    for name in before:
        old, new = before[name]["answers"][0], after[name]["answers"][0]
        lines += [
            "",
            f"{name}: {old['question']}",
            f"  truth   {old['truth']}",
            f"  before  {old['answer']}",
            f"  after   {new['answer']}",
        ]
    return "\n".join(lines)
