"""General ability by lm-evaluation-harness: a model of ours in its own ``HFLM``."""

import copy
import difflib
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from npo_fast.errors import UserError, first_line
from npo_fast.model.causal_lm import CausalLM

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
        folders = sorted({str(p if p.is_dir() else p.parent.resolve()) for p in own.values()})
        try:
            known = TaskManager(include_path=folders, include_defaults=len(own) < len(specs))
        except Exception as error:  # of anyone's YAML
            raise UserError(f"--lm-eval {', '.join(specs)}: {first_line(error)}") from error
        chosen = [name for spec in specs for name in _names(known, spec, own.get(spec))]
        self.names = list(dict.fromkeys(chosen))
        logger.info(f"lm-eval: {', '.join(self.names)}")
        try:
            found = known.load(self.names)
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
        from lm_eval.models.huggingface import HFLM

        with lm.generating() as model:
            wrapped = HFLM(
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
        return {task: _numbers(values) for task, values in found["results"].items()}


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
