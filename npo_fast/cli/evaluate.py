"""``npo-fast evaluate``: TOFU's measures or MUSE's, of a model or of logs that exist already."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from npo_fast import tables
from npo_fast.cli.console import Output
from npo_fast.cli.help import next_commands, report_command
from npo_fast.evaluation.settings import EvaluationSettings
from npo_fast.metrics import LogForm, examples_in
from npo_fast.run_files import RUN
from npo_fast.runs.muse import SuiteName
from npo_fast.runs.options import AnswersWithLoss, ModelOptions


@dataclass(frozen=True)
class DataOptions:
    """What to measure."""

    suite: SuiteName = "tofu"
    """tofu: questions and answers. muse: articles and books (VerbMem, KnowMem, PrivLeak)."""
    data: str | None = None
    """Hub dataset (locuslab/TOFU, muse-bench/MUSE-News) or folder. TOFU's real authors and world
    facts are measured too; of MUSE, all sets."""
    forget: str | None = None
    """What was forgotten: a file, or a split of --data. If there is a <name>_perturbed beside it,
    its wrong answers are used too."""
    retain: str | None = None
    """What was kept: a file, or a split of --data."""
    holdout: str | None = None
    """Records like --forget that no model saw. Can an attack tell the two apart (membership)?"""
    loss_on: AnswersWithLoss = "last"
    reference: str | None = None
    """Model before unlearning: for KL(reference || model), and the answers' perplexity under it."""
    log: Path | None = None
    """Measure these evaluation logs (a file or folder); runs no model."""
    retrained: Path | None = None
    """Logs of a model trained without the forget set: for forget quality and PrivLeak."""
    original: Path | None = None
    """Logs of the model before unlearning: the verdict compares with them."""
    lm_eval: Annotated[str | None, tyro.conf.arg(metavar="TASKS")] = None
    """Tasks of lm-evaluation-harness, such as mmlu,arc_easy; or a YAML file or folder with your
    own."""
    output: Path | None = None
    """Folder for the evaluation logs. Without it they are not kept."""
    log_format: LogForm = "tofu"
    """Form of the logs in --output: TOFU's files, or open-unlearning's TOFU_EVAL.json. Both can be
    read again."""
    overwrite: bool = False
    """Replace the logs that are in the output folder."""
    no_utility: bool = False
    """Leave out TOFU's real authors and world facts: faster, but without model utility."""


@dataclass(frozen=True)
class FixedModel(ModelOptions):
    """The model, the device it runs on, and how text becomes tokens."""

    quantize: Literal["none", "4bit"] = "none"
    """"4bit" loads the weights as NF4 (bitsandbytes)."""
    lora_rank: tyro.conf.Suppress[int] = 0
    lora_alpha: tyro.conf.Suppress[int | None] = None


@dataclass(frozen=True)
class Command:
    """Options of npo-fast evaluate, by group."""

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
    if scores.folder is not None and (scores.folder.parent / RUN).is_file():
        texts.append("\n".join(next_commands(report_command(scores.folder.parent))))
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
