"""Run folders as a report sees them: records, measures, and the commands that make more."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npo_fast.boundary import read_json
from npo_fast.data.readers import IN_MEMORY
from npo_fast.data.rendering import as_pairs
from npo_fast.errors import UserError, named
from npo_fast.metrics import FORGET, Result, examples_in, holds_logs, load_result, muse
from npo_fast.metrics.evidence import Evidence
from npo_fast.metrics.intervals import intervals
from npo_fast.metrics.logs import TEXTS, same_records, values_of
from npo_fast.metrics.measures import measures
from npo_fast.metrics.verdict import Verdict, judge, of_same_records
from npo_fast.model.manifest import MANIFEST, DamagedError, checked_records, read_manifest
from npo_fast.paths import below_here
from npo_fast.reports.measured import Comparison, answer_logs, measures_of, records_in
from npo_fast.run_files import (
    EVALUATIONS,
    LOGGED_RECORDS,
    OWN_ANSWERS,
    RUN,
    STEPS,
    EvaluationLine,
    LoggedRecords,
    StepLine,
    read_all,
    read_metadata,
)
from npo_fast.suggestions import flag_of
from npo_fast.tables import printable
from npo_fast.trainer.settings import TrainSettings
from npo_fast.validation import check_shape

_MEASURED_WITH = {  # of the model's settings: what changes a measure, and the usual value
    "template": "auto", "max_length": 512, "dtype": "auto", "attention": "auto",
    "quantize": "none",
}  # fmt: skip
_GROUPS = ("model", "data", "method", "training")  # of the settings: what makes the run again
_USUAL = {  # of ``unlearn``: settings that its command need not name
    **_MEASURED_WITH, "lora_rank": 0, "loss_on": "last", "method": "NPO+RT",
    "kl_positions": "answer",
    **vars(TrainSettings()),
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question, with the right one."""

    question: str  # with its template around it where it is from an evaluation log
    truth: str
    text: str

    def answers(self, question: str, truth: str) -> bool:
        """Whether this answers that question, with or without a template around either."""
        same = question in self.question or self.question in question
        return same and self.truth.strip() == truth.strip()


@dataclass(frozen=True)
class RunRecord:
    """One run folder."""

    name: str
    folder: Path
    metadata: Mapping[str, Any]  # run.json
    steps: Sequence[Mapping[str, Any]]  # steps.jsonl
    evaluations: Sequence[Mapping[str, Any]]  # evaluations.jsonl
    result: Result  # logs in eval/; empty where there are none
    logged: Mapping[str, Any] = field(default_factory=dict)  # ``LoggedRecords`` of these logs

    @property
    def settings(self) -> Mapping[str, Any]:
        """Flags of the run, by group and name."""
        settings: Mapping[str, Any] = self.metadata.get("settings", {})
        return settings

    @property
    def method(self) -> str:
        """The unlearning method, or the command of a run that has none."""
        name = self.settings.get("method", {}).get("method")
        return str(name or self.metadata.get("command", "unknown"))

    @property
    def time_s(self) -> float | None:
        """Seconds in optimiser steps alone, without loading, evaluating and saving."""
        return sum(step["time_ms"] for step in self.steps) / 1000 if self.steps else None

    def setting(self, group: str, name: str) -> Any:
        """The value of a flag; None where the run does not record it."""
        return self.settings.get(group, {}).get(name)

    def number(self, group: str, name: str) -> float | None:
        """The value of a flag that is a number; ``UserError`` where the run records another.

        Of "auto" it is what the run found.
        """
        value: float | None = self.setting(group, name)
        if value == "auto":
            value = self.metadata.get(name)
        with named(f"{self.folder / RUN} is damaged"):
            check_shape(value, float | None, f"settings.{group}.{name}")
        return value

    def measured(self, retrained: Result) -> tuple[dict[str, Any], str]:
        """Measures of the final model, and what they were measured on.

        Raises:
            UserError: the retrained model's logs are of other forget items.
        """
        if self.result:
            source = ", ".join(filter(None, ("eval/ logs", records_in(self.result))))
            return measures_of(self.result, retrained), source
        if evaluation := self.metadata.get("best") or next(reversed(self.evaluations), None):
            count = self.setting("watch", "eval_records")
            return dict(evaluation), f"step {evaluation['step']}, up to {count} records a set"
        after = self.metadata.get("after") or {}
        count = self.setting("report", "report_records")
        return dict(after), f"up to {count} records a set" if after else "nothing"

    def verdict(self, original: Result, retrained: Result) -> Verdict | None:
        """What came out: of its logs in eval/ beside other models, else as the run found.

        None of a run that forgets nothing.

        Raises:
            UserError: the retrained model's logs cannot be compared with those of the run.
        """
        own = self.metadata.get("verdict")
        found = None if own is None else Verdict.of(own)
        if not self.result or self.metadata.get("command") != "unlearn":
            return found
        scores, before = measures_of(self.result, retrained), self._comparable(original)
        if muse.is_muse(self.result):
            between = intervals(self.result, registry=muse.MEASURES)
            judged = muse.verdict(self.result, retrained or None, before, between)
            return found if found and judged.outcome == "undecided" else judged
        sampled = of_same_records(self.metadata.get("before") or {}, self.result)
        return judge(
            Evidence(
                scores,
                before or sampled,
                measures(retrained),
                records=examples_in(self.result.get(FORGET, {})),
            )
        )

    def comparison(self, original: Result) -> Comparison | None:
        """Measures of the same records before and after the run, of as many as there are.

        Args:
            original: logs of the model before unlearning.
        """
        if self.result and (before := self._comparable(original)):
            return Comparison(before, measures_of(self.result, {}), records_in(self.result), True)
        if len(self.evaluations) > 1:
            last = self.metadata.get("best") or self.evaluations[-1]
            count = self.setting("watch", "eval_records")
            return Comparison(self.evaluations[0], last, f"up to {count} records of each set")
        before, after = (self.metadata.get(when) or {} for when in ("before", "after"))
        count = self.setting("report", "report_records")
        if before or after:
            return Comparison(before, after, f"up to {count} records of each set")
        if self.result:
            return Comparison({}, measures_of(self.result, {}), records_in(self.result), True)
        return None

    def _comparable(self, original: Result) -> dict[str, Any]:
        """Measures of logs of the same records and suite; {} of others."""
        same_suite = muse.is_muse(original) == muse.is_muse(self.result)
        alike = same_suite and same_records(self.result, original)
        return measures_of(original, {}) if alike else {}

    def answers(self, part: str, when: str) -> list[Answer]:
        """Answers to the ``forget`` or ``retain`` set, ``before`` or ``after`` the run.

        Those in evaluation logs of the final model come first.
        """
        logged = logged_answers(self.result, part) if when == "after" else []
        rows = self.metadata.get(when, {}).get(part, {}).get("answers", [])
        return [*logged, *(Answer(row["question"], row["truth"], row["answer"]) for row in rows)]

    def flat_settings(self) -> dict[str, Any]:
        """All that can change a number: flags that were set, versions, fingerprints of the data."""
        groups = [values for group, values in self.settings.items() if group != "run"]
        flags = [item for values in groups for item in values.items()]
        data = self.metadata.get("data", {})
        return {
            **{name: value for name, value in flags if value is not None},
            **self.metadata.get("versions", {}),
            "attention kernel": self.metadata.get("attention"),
            **{f"{name} data, SHA-256": str(f.get("sha256"))[:12] for name, f in data.items()},
        }

    @property
    def from_rows(self) -> bool:
        """Whether the run's data were rows in memory, which no command can name."""
        return IN_MEMORY in self.settings.get("data", {}).values()

    def command(self, *more: str) -> str | None:
        """The ``npo-fast`` command that makes the run in a new folder, with ``more`` flags.

        Settings that have their default are left out. None where data or model were objects in
        memory, or the method terms of one's own.
        """
        in_memory = str(self.setting("model", "model")).endswith("(in memory)")
        if self.from_rows or in_memory or "terms" in self.metadata:
            return None
        verb = str(self.metadata.get("command", "unlearn"))
        words, usual = ["npo-fast", verb], _USUAL if verb == "unlearn" else {}
        for group in _GROUPS:
            settings = self.settings.get(group, {})
            words += _flags({n: v for n, v in settings.items() if n not in usual or v != usual[n]})
        return shlex.join([*words, "--output", f"{_place(self.folder)}-again", *more])

    def evaluate_command(
        self,
        overwrite: bool = False,
        model: str | None = None,
        output: str | None = None,
        forget: str | None = None,
    ) -> str:
        """The ``npo-fast evaluate`` command that writes ``eval/``; for rows the Python call.

        Args:
            model: another model to evaluate.
            output: another folder for the logs.
            forget: other forget records.
        """
        folder = model or _place(self.folder)
        logs = output or str(Path(folder, "eval"))
        if self.from_rows:
            retain = "retain=ROWS, " if self.setting("data", "retain") else ""
            more = ", overwrite=True" if overwrite else ""
            return f"npo_fast.evaluate({folder!r}, forget=ROWS, {retain}output={logs!r}{more})"
        if muse.is_muse(self.result):
            suite = {"model": folder, "suite": "muse", "data": "MUSE_DATA"}
            written = {"output": logs, "overwrite": overwrite}
            return shlex.join(["npo-fast", "evaluate", *_flags({**suite, **written})])
        data = {name: self.setting("data", name) for name in ("data", "forget", "retain")}
        data["forget"] = forget or data["forget"] or "FORGET"
        if data["retain"] == "auto":
            data["retain"] = Path(_place(self.folder), OWN_ANSWERS)
        if (loss_on := self.setting("data", "loss_on")) not in (None, "last"):
            data["loss_on"] = loss_on
        loading = {name: self.setting("model", name) for name in _MEASURED_WITH}
        flags = {
            "model": folder,
            **data,
            **{name: value for name, value in loading.items() if value != _MEASURED_WITH[name]},
            "output": logs,
            "overwrite": overwrite,
        }
        return shlex.join(["npo-fast", "evaluate", *_flags(flags)])


def load_run(folder: Path, name: str) -> RunRecord:
    """Reads a run folder.

    Raises:
        UserError: the folder is not a run's, or a record in it cannot be read.
    """
    if not (folder / RUN).exists():
        raise UserError(
            f"{str(folder)!r} is not a run folder, it holds no run.json: name the --output of "
            "npo-fast unlearn or npo-fast finetune"
        )
    metadata = read_metadata(folder)
    if metadata.get("status") == "finished":
        _check_records(folder)
    logs = folder / "eval"
    records = logs / LOGGED_RECORDS
    return RunRecord(
        name,
        folder,
        metadata,
        read_all(folder / STEPS, StepLine),
        read_all(folder / EVALUATIONS, EvaluationLine),
        load_result(logs) if holds_logs(logs) else {},
        read_json(records, LoggedRecords, "evaluate again") if records.is_file() else {},
    )


def load_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Reads run folders, each named by the shortest end of its path that is unique.

    Raises:
        UserError: a folder is named twice or cannot be read.
    """
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("a run was named twice: name each folder once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [
        load_run(folder, printable("/".join(path.parts[-depth:])))
        for folder, path in zip(folders, paths, strict=True)
    ]


def logged_answers(result: Result, part: str) -> list[Answer]:
    """The answers in evaluation logs to the ``forget`` or ``retain`` set."""
    logs = [log for log in answer_logs(result, part) if TEXTS in log]
    rows = [row for log in logs for row in values_of(log, TEXTS)]
    return [Answer(_question(prompt), truth, text) for prompt, text, truth in rows]


def _question(prompt: str) -> str:
    """The question of a prompt in the plain template, without examples before it."""
    asked = prompt.rstrip().removesuffix("\nAnswer:")
    return asked.rpartition("Question: ")[2] if asked != prompt.rstrip() else prompt


def _place(folder: Path) -> str:
    """A folder as a command names it: as short as the working directory allows."""
    return below_here(str(folder))


def _check_records(folder: Path) -> None:
    """Raises ``UserError`` where the records of a run that has ended were changed since."""
    model = folder / "model"
    if not (model / MANIFEST).is_file():
        return
    try:
        for name, state in read_manifest(model)["records"].items():
            checked_records(folder / name, state, ended=True)
    except DamagedError as error:
        raise UserError(
            f"{error}. Restore it, or delete {model / MANIFEST} to take it as it is now"
        ) from error


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """The words of a command that ask for these settings; those that were not set need none."""
    words = []
    for name, value in settings.items():
        flag = flag_of(name)
        if value is True:
            words.append(flag)
        elif isinstance(value, Mapping):
            words += [flag, *as_pairs(value)] if value else []
        elif value is not None and value is not False and value not in ("", "auto"):
            words += [flag, str(value)]
    return words


SAMPLE_HEADER = ("set", "measure", "before", "after")
_SAMPLED = {
    "probability": "probability",
    "rouge_l_recall": "ROUGE-L",
    "without_end": "answers without an end",
}


def sample_rows(metadata: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """The short report of ``run.json``, before and after, as rows under ``SAMPLE_HEADER``."""
    before, after = metadata.get("before", {}), metadata.get("after", {})
    return [
        (name, label, before[name][key], after[name][key])
        for name in before
        if name in after
        for key, label in _SAMPLED.items()
        if key in before[name] and key in after[name]
    ]
