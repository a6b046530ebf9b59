"""``finetune``: the negative log-likelihood of the answers."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from npo_fast.data import LossOn, Records, as_rows, describe, load_records
from npo_fast.errors import UserError
from npo_fast.methods import FINETUNE
from npo_fast.runs.callbacks import Callback
from npo_fast.runs.models import Model, ModelSource
from npo_fast.runs.options import FINETUNING, FinetuneData, ModelOptions, RunOptions
from npo_fast.runs.preparing import PreparedRun, prepare_run
from npo_fast.runs.run import Run
from npo_fast.runs.training import run_training, with_enough_memory
from npo_fast.trainer.settings import TrainSettings
from npo_fast.validation import with_checked_keywords


@with_checked_keywords
def finetune(
    model: Model,
    *,
    train: Records = "",
    output: str | Path | None = None,
    data: str | Path | None = None,
    loss_on: LossOn = "last",
    tokenizer: Any = None,
    loading: ModelOptions = ModelOptions(),
    training: TrainSettings = FINETUNING,
    run: RunOptions = RunOptions(),
    callbacks: Iterable[Callback] = (),
) -> Run:
    """Teaches a model a set of records: ``npo-fast finetune``.

    The same call goes on with a run in ``output`` that was interrupted.

    Args:
        train: a file or folder, a split of ``data``, or rows (``docs/data.md``).

    The other arguments and the errors are those of ``unlearn``.
    """
    source = ModelSource(model, loading, tokenizer)
    options = run if output is None else replace(run, output=Path(output))
    options = options.after_restart()
    train = as_rows(train, "train")
    inputs = FinetuneData(describe(train), describe(data), loss_on)
    if train == "" and data is None:
        raise UserError("say what to teach with --train (a file, or a split of --data)")
    options.check(source.options, train=inputs.train, data=inputs.data)
    records = {"train": load_records(train, inputs.data, "train", loss_on)}
    names = {"train": inputs.train}
    settings = {"model": source.options, "data": inputs, "training": training, "run": options}
    prepared = prepare_run("finetune", source, records, names, FINETUNE, settings, callbacks)
    if options.dry_run:
        return Run.planned(options.output, prepared.metadata)

    def run_once(prepared: PreparedRun) -> Run:
        with prepared.loaded() as lm:
            return run_training(lm, prepared)

    return with_enough_memory(prepared, run_once)
