"""``npo-fast evaluate``: TOFU's measures and more, of a model or of logs that exist already."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from npo_fast.cli.console import number, progress, say, show, table
from npo_fast.cli.settings import Common
from npo_fast.cli.training import ModelOptions
from npo_fast.data import Template, TokenizedExample, check_vocabulary
from npo_fast.errors import UserError
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.evaluation.suite import (
    Suite,
    check_forget_quality,
    tofu_suite,
    tokenize_suite,
)
from npo_fast.metrics import (
    AGGREGATED,
    FORGET,
    Result,
    has_truth_ratio,
    load_result,
    save_result,
    summary,
)


@dataclass(frozen=True)
class DataOptions:
    """What to measure on."""

    data: str | None = None
    """Hub dataset (locuslab/TOFU) or folder; its real_authors and world_facts join in."""
    forget: str | None = None
    """A file or a split; <name>_perturbed is taken where it lies beside it."""
    retain: str | None = None
    holdout: str | None = None
    """Records like --forget that no model saw: can an attack tell the two apart (membership)?"""
    reference: str | None = None
    """Model to measure the distance from, KL(reference || model): the one before unlearning."""
    log: Path | None = None
    """Measure this log (file or folder) instead of running a model."""
    retrained: Path | None = None
    """Log of the model trained without the forget set: forget quality compares with it."""
    output: Path | None = None
    """Folder for TOFU's log files."""
    overwrite: bool = False
    """Replace the logs that are in the output folder."""
    no_utility: bool = False
    """Leave out real authors and world facts."""


@dataclass(frozen=True)
class OptionalModel(ModelOptions):
    """Which model, where, and how text becomes tokens."""

    model: str = ""
    """Hub name, folder (of a LoRA adapter too), run folder of npo-fast, or .gguf file."""
    quantize: Literal["none", "4bit"] = "none"
    """"4bit" loads the weights as NF4 (bitsandbytes)."""
    lora_rank: tyro.conf.Suppress[int] = 0
    lora_alpha: tyro.conf.Suppress[int | None] = None


@dataclass(frozen=True)
class Command:
    model: OptionalModel = field(default_factory=OptionalModel)
    data: DataOptions = field(default_factory=DataOptions)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    common: Common = field(default_factory=Common)


def run(command: Command) -> None:
    data = command.data
    if data.output is not None and (data.output / AGGREGATED).exists() and not data.overwrite:
        raise UserError(f"{data.output} holds logs; name another --output or add --overwrite")
    retrained = None if data.retrained is None else load_result(data.retrained)
    if data.log is not None:
        result = dict(load_result(data.log))
        if retrained is not None and not has_truth_ratio(result.get(FORGET, {})):
            raise UserError(
                f"--retrained compares truth ratios of the forget set, and {data.log} has none: "
                "leave it out"
            )
    else:
        if not command.model.model:
            raise UserError("say which --model to evaluate, or which --log to read")
        if data.forget is None and data.retain is None:
            raise UserError("say what to evaluate on with --forget, --retain or both")
        if data.holdout is not None and data.forget is None:
            raise UserError("--holdout is compared with --forget: name both")
        suite = tofu_suite(
            data.data, data.forget, data.retain, data.holdout, utility=not data.no_utility
        )
        if retrained is not None:
            check_forget_quality(suite)
        for name, records in suite.items():
            say(f"{name}: {len(records)} records")
        result = dict(_measure(command, suite))
    if data.output is not None:
        save_result(result, data.output)
        say(f"logs saved in {data.output}")
    numbers = summary(result, retrained)
    show(
        {
            "metrics": numbers,
            "examples": {name: len(log["avg_gt_loss"]) for name, log in result.items()},
        },
        table(([name, number(value)] for name, value in numbers.items()), ("measure", "value")),
        command.common.json,
    )


def _measure(command: Command, suite: Suite) -> Result:
    from npo_fast.evaluation.evaluate import evaluate
    from npo_fast.model.reference_states import open_reference_states

    template = command.model.load_template()
    tokenized = tokenize_suite(template, suite)
    answers = {name: tokens.answers for name, tokens in tokenized.items()}
    settings, reference = command.evaluation, None
    if command.data.reference is not None:
        _check_tokens(command.data.reference, template, answers)
        other = replace(command.model, model=command.data.reference).load_model()
        check_vocabulary(answers, other.vocabulary)
        reference = open_reference_states(
            other, answers, None, "answer", settings.micro_batch_tokens
        )
        del other  # before the next one takes its memory
    lm = command.model.load_model()
    check_vocabulary(answers, lm.vocabulary)
    if reference is not None and len(reference.head.weight) != len(lm.head.weight):
        raise UserError(
            f"--reference predicts {len(reference.head.weight)} tokens and the model "
            f"{len(lm.head.weight)}: KL compares models with the same tokens"
        )
    with progress("evaluate") as update:
        return evaluate(lm, template, tokenized, settings, update, reference)


def _check_tokens(
    reference: str, template: Template, sequences: Mapping[str, list[TokenizedExample]]
) -> None:
    """The tokens to be compared mean the same to both models, as far as the reference can tell."""
    from npo_fast.model.load import load_tokenizer

    try:
        other = load_tokenizer(reference)
    except UserError:
        return  # a folder with weights alone
    used = sorted({i for own in sequences.values() for one in own for i in one.input_ids})
    ours, theirs = (t.convert_ids_to_tokens(used) for t in (template.tokenizer, other))
    if differ := [pair for pair in zip(used, ours, theirs, strict=True) if pair[1] != pair[2]]:
        token, own, found = differ[0]
        raise UserError(
            f"--reference {reference} has another vocabulary than the model: its token {token} is "
            f"{found!r}, not {own!r}, and KL compares models with the same tokens"
        )
