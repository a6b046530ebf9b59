"""``finetune``: the negative log-likelihood of the answers."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from npo_fast.data import Records, describe, load_records
from npo_fast.errors import UserError
from npo_fast.methods import FINETUNE
from npo_fast.runs.callbacks import Callback
from npo_fast.runs.models import Model, ModelSource
from npo_fast.runs.options import FINETUNING, FinetuneData, ModelOptions, RunOptions
from npo_fast.runs.progress import ProgressBar
from npo_fast.runs.run import Run
from npo_fast.runs.tokens import describe_run, tokenize_sources
from npo_fast.runs.training import check_fit, find_resumable, run_training
from npo_fast.trainer.settings import TrainSettings


def finetune(
    model: Model,
    *,
    train: Records = "",
    output: str | Path | None = None,
    data: str | None = None,
    tokenizer: Any = None,
    loading: ModelOptions = ModelOptions(),
    training: TrainSettings = FINETUNING,
    run: RunOptions = RunOptions(),
    callbacks: Iterable[Callback] = (),
) -> Run:
    """Teaches a model a set of records: ``npo-fast finetune``.

    The same call goes on with a run in ``output`` that was interrupted.

    Args:
        train: a file, a split of ``data``, rows or a ``datasets.Dataset``.

    The other arguments and the errors are those of ``unlearn``.
    """
    if isinstance(train, str) and not train and data is None:
        raise UserError("say what to teach with --train (a file, or a split of --data)")
    options = run if output is None else replace(run, output=Path(output))
    source = ModelSource(model, loading, tokenizer)
    source.options.check_training()
    options.check(source.options)
    inputs = FinetuneData(describe(train), data)
    records = {"train": load_records(train, data, "train")}
    tokens = tokenize_sources(
        records, {"train": inputs.train}, source.template(), FINETUNE, training
    )
    settings = {"model": source.options, "data": inputs, "training": training, "run": options}
    metadata = describe_run("finetune", settings, tokens)
    resumable = find_resumable(options, metadata, source.in_memory is not None)
    if options.dry_run:
        return Run.planned(options.output, metadata)
    with source.loaded(resumable) as lm:
        check_fit(lm, tokens, FINETUNE, training)
        run_training(
            lm, tokens, FINETUNE, training, options, metadata,
            resumable=resumable, callbacks=[ProgressBar(options.output.name), *callbacks],
        )  # fmt: skip
    return Run(options.output, lm.model, tokens.template.tokenizer)
