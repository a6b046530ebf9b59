"""Runs what a page of the documentation shows: its commands, its Python, the files that it writes.

```bash                 every line runs; see ``Page.run_line`` for what only has to parse
```python               the blocks of a page run in order, in one namespace
```json facts.jsonl     json, csv, yaml, toml or text with a name: the file is written
```text                 without a name: output or equations, nothing runs
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from npo_fast.cli import main
from npo_fast.cli.console import Output
from tests.docs.world import LINKED, ROOT

BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?: (?P<name>\S+))?\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
FILES = ("json", "csv", "yaml", "toml", "text")  # languages of files
NOT_RUN = (  # an environment is there already; the rest needs a network
    "python3 -m venv", "source ", ". .venv", "pip install", "python -m pip install", "git clone",
    "hf download", "apt", "conda ", "docker ",
)  # fmt: skip
# Commands of npo-fast of which only the flags are checked.
PARSED_ONLY = (
    re.compile(r"(demo|bench|synthetic)\b"),  # minutes
    re.compile(r"reproduce (?!.*--list)"),  # minutes, and published logs
    re.compile(r".* --lm-eval (?!tasks\b)"),  # tasks of the hub; a folder tasks/ is run
    re.compile(r".* --push-to-hub\b"),
    re.compile(r".* --track (wandb|mlflow|trackio)\b"),  # of the extras, only tensorboard is tested
    re.compile(r".* (--device cuda|--attention flash|--quantize)\b"),  # GPUs and their libraries
)
WRITES = ("unlearn", "finetune", "evaluate", "attack")  # verbs whose --output must be new
ASSIGNMENT = re.compile(r"(?:export )?([A-Za-z_]\w*)=(\S*|'[^']*'|\"[^\"]*\"|\$\(.*\))")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
SHELL = re.compile(r"[|<>;&`]|\$\(")  # what a line needs a shell for
PROCESSES = "2"  # of torchrun
LIMIT_S = 300


class PageError(pytest.fail.Exception):
    """What a reader would run into, with page and line and without a traceback."""


@dataclass
class Page:
    """A page of the documentation and the folder in which its commands run."""

    source: Path
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)  # that its lines have set
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    written: set[Path] = field(default_factory=set)  # by its commands

    def run(self) -> None:
        """Runs every block from top to bottom; the working directory is the page's folder."""
        self.run_text(self.source.read_text(encoding="utf-8"))

    def run_text(self, text: str) -> None:
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start()) + 2
            code = re.sub(rf"^{block['indent']}", "", block["code"], flags=re.MULTILINE)
            language, name = block["language"], block["name"]
            if name is not None and language in FILES:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_text(code, encoding="utf-8")
            elif language == "bash":
                for offset, command in command_lines(code):
                    self.run_line(command, line + offset)
            elif language == "python":
                self.run_python(code, line)
            elif language != "text":
                self.fail(line - 1, f"```{language}: no test runs this; see tests/docs/pages.py")

    def fail(self, line: int, message: str) -> None:
        raise PageError(f"{os.path.relpath(self.source, ROOT)}:{line}: {message}", pytrace=False)

    def run_python(self, code: str, line: int) -> None:
        """Runs a block; line numbers of tracebacks are those of the page."""
        said, at = io.StringIO(), None
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                exec(compile("\n" * (line - 1) + code, str(self.source), "exec"), self.names)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            at = [line, *(each.lineno for each in frames if each.filename == str(self.source))][-1]
            said.write(f"\n{traceback.format_exc()}")
        if at is not None:
            self.fail(at, said.getvalue()[-4000:])

    def run_line(self, command: str, line: int) -> None:
        """Runs one command, or checks as much of it as can be checked here."""
        for output in re.findall(rf"\b(?:{'|'.join(WRITES)}) .*--output (\S+)", command):
            self.make_way(Path(output))
        if command.startswith(NOT_RUN):
            self.check_extras(command, line)
        elif match := ASSIGNMENT.fullmatch(command):
            self.variables[match[1]] = self.shell(f'X={match[2]}; printf %s "$X"', line).stdout
        elif re.match(r"python benchmarks/", command):
            self.check_benchmark(command, line)
        elif command.startswith("torchrun "):
            self.shell(on_two(self.expanded(command)), line)
        elif command.startswith("npo-fast ") and not SHELL.search(QUOTED.sub("", command)):
            self.npo_fast(shlex.split(self.expanded(command))[1:], command, line)
        else:
            self.shell(command, line)

    def npo_fast(self, arguments: list[str], command: str, line: int) -> None:
        """Runs a command in this process: another one would import PyTorch for seconds."""
        said, shown = io.StringIO(), io.StringIO()
        only_parsed = any(kind.match(" ".join(arguments)) for kind in PARSED_ONLY)
        with (
            only_parsing(arguments[0]) if only_parsed else contextlib.nullcontext(),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(shown),
        ):
            try:
                code = main(arguments)
            except SystemExit as end:  # --help
                code = end.code or 0
        if code:
            self.fail(line, f"exit code {code}\n$ {command}\n{said.getvalue()[-4000:]}")

    def make_way(self, output: Path) -> None:
        """Removes a finished run of the world where a page makes one of that name itself."""
        if output not in self.written and (self.folder / output).is_dir():
            shutil.rmtree(self.folder / output)
        self.written.add(output)

    def shell(self, command: str, line: int) -> subprocess.CompletedProcess[str]:
        environment = os.environ | self.variables | {
            "PATH": f"{self.folder / '.bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=self.folder, env=environment,
            capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        if done.returncode:
            said = f"{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
            self.fail(line, f"exit code {done.returncode}\n$ {command}\n{said}")
        return done

    def expanded(self, command: str) -> str:
        """With variables that earlier lines have set."""
        return re.sub(
            r"\$\{?(\w+)\}?", lambda match: self.variables.get(match[1], match[0]), command
        )

    def check_extras(self, command: str, line: int) -> None:
        """The extras in brackets are those of pyproject.toml."""
        known = extras()
        for names in re.findall(r"(?:npo-fast|\.)\[([\w,-]+)\]", command):
            if unknown := set(names.split(",")) - known:
                self.fail(line, f"no extra {', '.join(sorted(unknown))} in pyproject.toml")

    def check_benchmark(self, command: str, line: int) -> None:
        """The script is there and knows the flags: benchmarks take minutes to hours."""
        _, script, *arguments = shlex.split(command)
        if not (ROOT / script).is_file():
            self.fail(line, f"there is no {script}")
        code = (ROOT / script).read_text(encoding="utf-8")
        for flag in (each.partition("=")[0] for each in arguments if each.startswith("--")):
            setting = rf"^    {flag[2:].replace('-', '_')}: "  # of a dataclass that tyro reads
            if f'"{flag}"' not in code and not re.search(setting, code, re.MULTILINE):
                self.fail(line, f"{script} has no {flag}")


def only_parsing(verb: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, a command reads its settings and does nothing."""
    module = importlib.import_module(f"npo_fast.cli.{verb}")
    return mock.patch.object(module, "run", return_value=Output({}, ""))


def open_page(source: Path, world: Path, folder: Path) -> Page:
    """A page with the world of its own that its commands may change."""
    shutil.copytree(world, folder, dirs_exist_ok=True)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    programs = {
        "npo-fast": f'exec {sys.executable} -m npo_fast "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "python": f'exec {sys.executable} "$@"',
    }
    (folder / ".bin").mkdir()
    for name, script in programs.items():
        (folder / ".bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / ".bin" / name).chmod(0o755)
    return Page(source, folder)


def command_lines(code: str) -> list[tuple[int, str]]:
    """The commands of a block, continued lines joined, each with the number of its line.

    A block with a here-document or a loop is one command.
    """
    if re.search(r"<<|^(for|while|if) ", code, re.MULTILINE):
        return [(0, code)]
    commands: list[tuple[int, str]] = []
    continued = False
    for number, line in enumerate(code.splitlines()):
        text = re.sub(r"(^|\s+)#( .*)?$", "", line).strip()
        if continued:
            start, before = commands.pop()
            commands.append((start, f"{before} {text}"))
        elif text:
            commands.append((number, text))
        continued = text.endswith("\\")
        if continued:
            commands[-1] = (commands[-1][0], commands[-1][1].removesuffix("\\").rstrip())
    return commands


def on_two(command: str) -> str:
    """``torchrun`` on this machine, with two processes in the place of any number."""
    command = re.sub(r"--nnodes[ =]\S+|--node-rank[ =]\S+|--rdzv-\S+?[ =]\S+", "", command)
    command = re.sub(r"(--nproc[-_]per[-_]node[ =])\S+", rf"\g<1>{PROCESSES}", command)
    return command.replace("torchrun ", "torchrun --standalone ", 1)


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = ", section, re.MULTILINE))
