"""General ability by lm-evaluation-harness: a model of ours in its own ``HFLM``."""

import copy
import difflib
import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from npo_fast.boundary import read_text
from npo_fast.distributed import broadcast_object, is_main_process
from npo_fast.errors import UserError, first_line, reading
from npo_fast.model.causal_lm import CausalLM
from npo_fast.offline import hub
from npo_fast.ops.vocab_parallel import gather_rows

logger = logging.getLogger(__name__)

Results = Mapping[str, Mapping[str, float]]  # task or group -> metric -> value
_YAML = (".yaml", ".yml")


class Harness:
    """Tasks of lm-evaluation-harness; they and their data are found before a model is loaded.

    Args:
        tasks: names, patterns such as ``mmlu_*``, YAML files, or folders of them; or one text with
            commas between them. Of a folder every task is taken.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """

    def __init__(self, tasks: str | Sequence[str]) -> None:
        names = tasks.split(",") if isinstance(tasks, str) else map(str, tasks)
        specs = [name.strip() for name in names if name.strip()]
        if not specs:
            raise UserError("--lm-eval takes names of tasks with commas between: mmlu,arc_easy")
        for library in ("lm_eval", "accelerate"):  # its HFLM imports accelerate
            if find_spec(library) is None:
                raise UserError(
                    f"--lm-eval needs {library}, which is not here: pip install 'npo-fast[lm-eval]'"
                )
        from lm_eval.tasks import TaskManager

        own = {spec: Path(spec) for spec in specs if Path(spec).is_dir() or spec.endswith(_YAML)}
        if missing := [spec for spec, path in own.items() if not path.exists()]:
            raise UserError(f"--lm-eval {missing[0]}: no such file")
        for path in own.values():
            if path.is_file():
                with reading(f"--lm-eval {path}"):
                    yaml.compose(read_text(path))
        folders = sorted({str(p if p.is_dir() else p.parent.resolve()) for p in own.values()})
        logger.info("lm-eval: looking for the tasks")
        try:
            known = TaskManager(include_path=folders, include_defaults=len(own) < len(specs))
        except Exception as error:  # of anyone's YAML
            raise UserError(f"--lm-eval {', '.join(specs)}: {first_line(error)}") from error
        chosen = [name for spec in specs for name in _names(known, spec, own.get(spec))]
        self.names = list(dict.fromkeys(chosen))
        logger.info(f"lm-eval: {', '.join(self.names)}")
        try:
            with hub(f"the data of {', '.join(self.names)}"):
                found = known.load(self.names)
        except UserError as error:
            raise UserError(f"--lm-eval: {error}") from error
        except Exception as error:  # a task is a program, and its data may be anywhere
            raise UserError(f"--lm-eval {', '.join(specs)}: {first_line(error)}") from error
        within = {*chain(*found.get("group_map", {}).values())}
        loaded = {**found["tasks"], **found.get("groups", {})}
        self._manager = known
        self._tasks = [task for name, task in loaded.items() if name not in within]

    def run(self, lm: CausalLM, tokenizer: Any, batch_size: int) -> Results:
        """Returns the metrics of every task and group, each with its ``<metric>_stderr``.

        Prompts are those of the tasks, without a chat template.

        Raises:
            UserError: a task fails.
        """
        from lm_eval import simple_evaluate

        shown = nullcontext() if is_main_process() else redirect_stderr(io.StringIO())
        with lm.generating() as model, shown:
            wrapped = _class_for(lm)(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size
            )
            try:
                found = simple_evaluate(
                    wrapped, tasks=self._tasks, task_manager=self._manager, log_samples=False
                )
            except (UserError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise UserError(
                    f"--lm-eval {', '.join(self.names)}: {first_line(error)}"
                ) from error
        results = broadcast_object(found and found["results"])  # None but on the first of a machine
        return {task: _numbers(values) for task, values in results.items()}


def _class_for(lm: CausalLM) -> Any:
    """``HFLM``; where processes share ``lm``, one that deals each batch out among them.

    The harness believes itself alone on each of them, and so asks all for the same batches.
    """
    from lm_eval.models.huggingface import HFLM

    if lm.vocabulary_slice is None:
        return HFLM
    group, ranks = lm.vocabulary_slice.group, lm.world_size

    def own(batch: Tensor) -> Tensor:  # (B, …) -> (n, …), n the same on all
        rows = torch.arange(lm.rank, lm.rank + ranks * -(-len(batch) // ranks), ranks)
        return batch[rows.to(batch.device) % len(batch)]

    def of_all(rows: Tensor, count: int) -> Tensor:  # (n, …) -> (B, …)
        gathered = gather_rows(rows, [len(rows)] * ranks, group).unflatten(0, (ranks, len(rows)))
        return gathered.transpose(0, 1).flatten(0, 1)[:count]

    class SharedLM(HFLM):  # type: ignore[misc, no-any-unimported]
        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            return of_all(super()._model_call(own(inps), attn_mask, labels), len(inps))

        def _model_generate(
            self, context: Tensor, max_length: int, stop: list[str], **options: Any
        ) -> Tensor:
            if options.get("attention_mask") is not None:
                options["attention_mask"] = own(options["attention_mask"])
            found = super()._model_generate(
                own(context), max_length, stop, synced_gpus=True, **options
            )
            more = lm.all_reduce_max(found.shape[1]) - found.shape[1]
            found = torch.nn.functional.pad(found, (0, more), value=self.tokenizer.pad_token_id)
            return of_all(found, len(context))

    return SharedLM


def _names(known: Any, spec: str, path: Path | None) -> list[str]:
    """The names that ``spec`` stands for, in the index of tasks ``known``."""
    if path is None:
        if names := known.match_tasks([spec]):
            return sorted(names)
        near = difflib.get_close_matches(spec, known.all_tasks, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"--lm-eval: lm-evaluation-harness has no task {spec!r}{hint}")
    place = path.resolve()
    files = {name: entry.yaml_path for name, entry in known.task_index.items() if entry.yaml_path}
    names = [
        name
        for name in (known.all_subtasks if path.is_dir() else files)
        if name in files and place in (files[name].resolve(), *files[name].resolve().parents)
    ]
    if not names:
        raise UserError(f"--lm-eval {spec}: no task is defined there (a YAML with the key task)")
    return names


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the results of a task: ``acc_stderr,none`` becomes ``acc_stderr``."""
    numbers = {}
    for key, value in values.items():
        metric, comma, answers = key.partition(",")
        if comma and isinstance(value, (int, float)):
            name, _, error = metric.partition("_stderr")
            by = "" if answers == "none" else f" ({answers})"
            numbers[f"{name}{by}{'_stderr' if '_stderr' in metric else ''}{error}"] = float(value)
    return numbers
