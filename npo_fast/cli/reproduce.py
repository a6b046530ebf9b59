"""``npo-fast reproduce``: numbers that others published, measured again and held against them."""

import importlib
import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from npo_fast import tables
from npo_fast.cli.console import Output
from npo_fast.cli.settings import parse
from npo_fast.errors import UserError, reading
from npo_fast.experiments.reproduce.rows import (
    Compared,
    Row,
    bound,
    chosen,
    commands_of,
    compare,
    described,
    filled,
    load_rows,
)
from npo_fast.versions import versions

# of a log's name, in folders of logs: as it is there, a file each, TOFU's layout
LOG_ENDINGS = ("", ".json", "_wd0.01/eval_results/ds_size300/eval_log_aggregated.json")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """Options of npo-fast reproduce."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Rows to measure, named as in --list. "log-*" is every row whose name begins with log-."""
    list: bool = False
    """Only show the rows (all, or the named ones): command, published numbers, tolerance,
    source."""
    data: str | None = None
    """Folder with the data, or published logs. Without it: those of the hub."""
    model: str | None = None
    """Model to measure, such as a folder of your own. Without it: the row's."""
    retrained: str | None = None
    """Model that never saw the forget set. Without it: the row's, or --model."""
    output: Path = Path("npo-fast-reproduce")
    """Folder for the results, with a folder for each row."""
    overwrite: bool = False
    """Replace earlier results in that folder."""


def run(command: Command) -> Output:
    """Measures published rows again; the exit code is 1 where a number is outside."""
    rows = load_rows()
    if command.list:
        shown = chosen(rows, command.names or ("*",))
        listed = [asdict(row) | {"commands": commands_of(row)} for row in shown]
        return Output({"rows": listed}, "\n\n".join(map(described, shown)))
    if not command.names:
        raise UserError("say which published rows to measure, by the names of --list")
    results: list[dict[str, Any]] = []
    failures: list[UserError] = []
    named = chosen(rows, command.names)
    for row in named:
        started = time.perf_counter()
        result: dict[str, Any] = {"name": row.name, "source": row.source}
        try:
            result["numbers"] = compare(row, _measure(row, command))
        except UserError as error:
            failures.append(type(error)(f"{row.name}: {error}{_cure(row)}"))
            if len(named) > 1:  # hours before the end
                logger.warning(f"warning: {failures[-1]}")
            result |= {"numbers": [], "error": str(failures[-1])}
        results.append(result | {"time_s": time.perf_counter() - started})
    if len(failures) == len(results):
        raise failures[0] if len(named) == 1 else UserError("none of these rows could be measured")
    good = not failures and all(each.within for result in results for each in result["numbers"])
    text = _text(results)
    for result in results:
        result["numbers"] = [asdict(each) for each in result["numbers"]]
    return Output({"rows": results, "versions": versions()}, text, exit_code=int(not good))


def _measure(row: Row, options: Command) -> Mapping[str, float]:
    """Runs the commands of a row; returns what the last one measured, by name."""
    places = {
        "data": options.data or row.data,
        "checkpoint": options.model or row.checkpoint,
        "retrained": options.retrained or options.model or row.retrained,
        "output": str(options.output / row.name),
    }
    result: Mapping[str, Any] = {}
    for line in row.commands:
        arguments = shlex.split(line)[1:]
        for i, argument in enumerate(arguments):
            if argument.startswith("{data}/"):
                argument = _log(argument.removeprefix("{data}/"), row, options.data)
            arguments[i] = filled(argument, places)
        if options.model and "--template-kwargs" in arguments:  # of the row's checkpoints
            i = arguments.index("--template-kwargs")
            logger.info(f"{options.model} goes without {' '.join(arguments[i : i + 2])}")
            del arguments[i : i + 2]
        if options.overwrite and "--output" in arguments:
            arguments.append("--overwrite")
        logger.info(f"$ npo-fast {shlex.join(arguments)}")
        verb, *rest = arguments
        module: Any = importlib.import_module(f"npo_fast.cli.{verb}")
        called, _ = parse(module.Command, rest, verb)
        result = module.run(called).result
    return _numbers_of(result)


def _log(name: str, row: Row, folder: str | None) -> str:
    """The file of a published log: in a folder, under one of its names there, or of the hub."""
    if folder is None and row.data:
        from huggingface_hub import hf_hub_download

        with reading(f"{name} of the hub's {row.data}"):
            return str(hf_hub_download(row.data, name, repo_type="dataset"))
    if folder is None:
        raise UserError("say where the logs are with --data")
    for ending in LOG_ENDINGS:
        if (file := Path(folder, name + ending)).is_file():
            return str(file)
    raise UserError(f"--data {folder} has no log {name}")


def _cure(row: Row) -> str:
    folders = "--data FOLDER and --model FOLDER" if row.checkpoint else "--data FOLDER"
    return f"; it needs {row.needs}, or {folders}" if row.needs else ""


def _numbers_of(result: Mapping[str, Any]) -> Mapping[str, float]:
    """Numbers by name in the result of ``evaluate`` or ``synthetic``."""
    if "metrics" in result:
        return dict(result["metrics"])
    exponents = {(x["loss"], x["axis"]): x["value"] for x in result["exponents"]}
    return {
        "claims that hold": sum(claim["holds"] for claim in result["claims"]),
        "GA exponent in n_f": exponents["GA", "samples"],
        "NPO exponent in n_f": exponents["NPO", "samples"],
        "order of NPO - GA in beta": result["limit_order"],
    }


def _text(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        numbers: list[Compared] = result["numbers"]
        rows += [
            (result["name"], each.measure, tables.number(each.expected),
             tables.number(each.measured), bound(each.tolerance),
             "yes" if each.within else "NO")
            for each in numbers
        ]  # fmt: skip
        if "error" in result:
            rows.append((result["name"], "not measured", "", "", "", "NO"))
    header = ("row", "measure", "published", "measured", "tolerance", "within")
    return tables.plain(rows, header)
