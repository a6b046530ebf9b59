"""``npo-fast evaluate``: TOFU's measures or MUSE's, of a model or of logs that exist already."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from npo_fast import tables
from npo_fast.cli.console import Output
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.metrics import LogForm, examples_in
from npo_fast.runs.muse import SuiteName
from npo_fast.runs.options import AnswersWithLoss, ModelOptions


@dataclass(frozen=True)
class DataOptions:
    """What to measure on."""

    suite: SuiteName = "tofu"
    """TOFU's measures of questions, or MUSE's of articles and books: VerbMem, KnowMem, PrivLeak."""
    data: str | None = None
    """Hub dataset (locuslab/TOFU, muse-bench/MUSE-News) or folder; TOFU's real_authors and
    world_facts join in, and MUSE's sets are all there."""
    forget: str | None = None
    """A file or a split; <name>_perturbed is taken where it lies beside it."""
    retain: str | None = None
    holdout: str | None = None
    """Records like --forget that no model saw: can an attack tell the two apart (membership)?"""
    loss_on: AnswersWithLoss = "last"
    reference: str | None = None
    """The model before unlearning: KL(reference || model), perplexity of the answers under it."""
    log: Path | None = None
    """Measure this log (file or folder) instead of running a model."""
    retrained: Path | None = None
    """Log of the model trained without the forget set, for forget quality and PrivLeak."""
    original: Path | None = None
    """Log of the model before unlearning: the verdict compares with it."""
    lm_eval: str | None = None
    """Tasks of lm-evaluation-harness: mmlu,arc_easy; a YAML file or folder has your own."""
    output: Path | None = None
    """Folder for the log files."""
    log_format: LogForm = "tofu"
    """Form of the files in --output: TOFU's, or open-unlearning's TOFU_EVAL.json. Both are read."""
    overwrite: bool = False
    """Replace the logs that are in the output folder."""
    no_utility: bool = False
    """Leave out real authors and world facts."""


@dataclass(frozen=True)
class FixedModel(ModelOptions):
    """Which model, where, and how text becomes tokens."""

    quantize: Literal["none", "4bit"] = "none"
    """"4bit" loads the weights as NF4 (bitsandbytes)."""
    lora_rank: tyro.conf.Suppress[int] = 0
    lora_alpha: tyro.conf.Suppress[int | None] = None


@dataclass(frozen=True)
class Command:
    """The options of ``npo-fast evaluate``, by group."""

    model: FixedModel = field(default_factory=FixedModel)
    data: DataOptions = field(default_factory=DataOptions)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


def run(command: Command) -> Output:
    """Evaluates a model or logs; returns the measures, their intervals and the verdict."""
    from npo_fast.runs.evaluating import evaluate

    sources = dict(vars(command.data))
    scores = evaluate(
        command.model.model, utility=not sources.pop("no_utility"), **sources,
        loading=command.model, evaluation=command.evaluation,
    )  # fmt: skip
    between = {
        name: f"{tables.number(low)} to {tables.number(high)}"
        for name, (low, high) in scores.intervals.items()
    }
    rows = ([name, value, between.get(name, "")] for name, value in scores.items())
    header = ("measure", "value", "95 % of resampled records")
    texts = [f"{tables.plain(rows, header)}\n\nverdict: {scores.verdict}"] if scores.logs else []
    if scores.lm_eval:
        texts.append(
            "lm-evaluation-harness\n"
            + tables.plain(
                (
                    [task, metric, value, each.get(f"{metric}_stderr")]
                    for task, each in scores.lm_eval.items()
                    for metric, value in each.items()
                    if not metric.endswith("_stderr")
                ),
                ("task", "metric", "value", "standard error"),
            )
        )
    return Output(
        {
            "metrics": scores,
            "intervals": scores.intervals,
            "examples": {name: examples_in(log) for name, log in scores.logs.items()},
            "verdict": asdict(scores.verdict),
            "lm_eval": scores.lm_eval,
        },
        "\n\n".join(texts),
        exit_code=int(scores.folder != command.data.output),  # logs that it did not take
    )
