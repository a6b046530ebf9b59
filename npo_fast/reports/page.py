"""One self-contained HTML page about run folders, and its table in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from npo_fast import tables
from npo_fast.errors import UserError
from npo_fast.methods import COEFFICIENTS
from npo_fast.metrics import FORGET, Result, has_truth_ratio, truth_ratio
from npo_fast.metrics.logs import same_records
from npo_fast.metrics.measures import score
from npo_fast.metrics.verdict import Verdict
from npo_fast.paths import places, shown
from npo_fast.reports import bars, svg
from npo_fast.reports.curves import evaluation_curves, step_curves
from npo_fast.reports.gaps import ENDED_EARLY, Gap, find_gaps
from npo_fast.reports.html import MARK, render
from npo_fast.reports.measured import (
    COLUMNS,
    Comparison,
    intervals_of,
    measures_of,
    some_names,
)
from npo_fast.reports.requests import REQUESTS, Requests
from npo_fast.reports.runs import Answer, RunRecord, logged_answers

_SETTINGS = {  # label in the table -> path in the settings
    "lr": ("training", "lr"),
    "epochs": ("training", "epochs"),
    "batch": ("training", "batch_size"),
    **{coefficient.label: ("method", coefficient.flag) for coefficient in COEFFICIENTS.values()},
    "keep utility": ("training", "keep_utility"),
    "seed": ("training", "seed"),
}
_ABOUT_RUNS = ("method", "status", "settings", "steps", "time [s]", "peak memory [MiB]", "device")
_COLUMNS_A_TABLE = 7  # of settings, beside the name of the run: more do not fit
Table = tuple[tables.Cells, list[str]]  # rows, header


class Value(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float


class Question(NamedTuple):
    """A question with the answers of models to it; None of a model that was not asked."""

    question: str
    truth: str
    before: str | None
    after: dict[str, str]  # by run
    retrained: str | None


class RunCard(NamedTuple):
    """What the page says of a run before all numbers."""

    run: RunRecord
    verdict: Verdict | None
    error: str  # with which it ended

    @property
    def state(self) -> str:
        """How the run ended, where it did not finish."""
        status = self.run.metadata.get("status")
        return str(status) if status in ENDED_EARLY else ""

    @property
    def outcome(self) -> str:
        """What the card is about: the state of a run that did not finish, else its verdict."""
        return self.state or ("" if self.verdict is None else self.verdict.outcome)


@dataclass
class Report:
    """Runs beside the model they began from and one retrained without the forget set."""

    runs: Sequence[RunRecord]
    original: Result = field(default_factory=dict)
    retrained: Result = field(default_factory=dict)
    answers: int = 20  # how many questions of each set are shown

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []  # cells by column, of runs and models to compare with
        self._judged: list[Verdict | None] = []  # of each run
        self._errors: list[Gap] = []  # logs that cannot be compared
        for run in self.runs:
            try:
                measured, source = run.measured(self.retrained)
            except UserError as error:
                self._errors.append(Gap(run.name, str(error)))
                measured, source = run.measured({})
            verdict = self._verdict(run)
            self._judged.append(verdict)
            self.rows.append(_row(run, measured, source, verdict))
        for name, result in self._anchors.items():
            try:
                measured = measures_of(result, self.retrained)
            except UserError as error:
                self._errors.append(Gap(name, str(error)))
                measured = measures_of(result, {})
            self.rows.append({"run": name, **_scores(measured), "measured on": "its logs"})

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        """The verdict of each run by name, in full."""
        pairs = zip(self.runs, self._judged, strict=True)
        return [(run.name, str(verdict)) for run, verdict in pairs if verdict is not None]

    def _verdict(self, run: RunRecord) -> Verdict | None:
        try:
            return run.verdict(self.original, self.retrained)
        except UserError:  # the retrained logs are of other items
            return run.verdict(self.original, {})

    @property
    def _anchors(self) -> dict[str, Result]:
        """Logs of the models to compare with, by name."""
        anchors = {"original": self.original, "retrained": self.retrained}
        return {name: result for name, result in anchors.items() if result}

    @cached_property
    def gaps(self) -> list[Gap]:
        """What the page lacks, each with the commands that add it."""
        found = find_gaps(self.runs, self.original, self.retrained)
        return [*self._errors, *found, *self._requests.missing]

    @property
    def missing(self) -> list[str]:
        """What the page lacks, a sentence each; code between backticks."""
        return [str(gap) for gap in self.gaps]

    def html(self) -> str:
        """The page as one HTML document without references to other files."""
        comparisons = self._comparisons
        return render(
            "report",
            title="Unlearning report",
            cards=[
                RunCard(run, verdict, self._published(str(run.metadata.get("error") or "")))
                for run, verdict in zip(self.runs, self._judged, strict=True)
            ],
            charts=bars.charts([run.name for run in self.runs], comparisons, self._same_retrained),
            records=_names_by_records(comparisons),
            has_before=any(each.before for each in comparisons.values()),
            questions={part: self._questions(part) for part in ("forget", "retain")},
            measures=self._measures(),
            tradeoff=self._tradeoff(),
            truth_ratios=self._truth_ratios(),
            requests=(*self._requests.table, self._requests.figure()),
            about_requests=REQUESTS,
            legend=[svg.Line.of(run.name, i) for i, run in enumerate(self.runs)],
            evaluation_curves=[*evaluation_curves(self.runs)],
            step_curves=[*step_curves(self.runs)],
            has_npo=any("NPO" in step["terms"] for run in self.runs for step in run.steps),
            about_runs=tables.from_records(
                [_only(row, ("run", *_ABOUT_RUNS)) for row in self.rows[: len(self.runs)]]
            ),
            differing=self._differing(),
            shared=self._shared(),
            gaps=[self._published_gap(gap) for gap in self.gaps],
        )

    def markdown(self) -> str:
        """The table of runs, and what is missing."""
        parts = [MARK, "# Unlearning report", tables.markdown(*tables.from_records(self.rows))]
        if self.verdicts:
            lines = (f"- {tables.markdown_text(f'{name}: {text}')}" for name, text in self.verdicts)
            parts += ["Verdicts:", "\n".join(lines)]
        if self._requests.after:
            parts += ["## Requests", REQUESTS, tables.markdown(*self._requests.table)]
        if self.gaps:
            parts += ["Missing:", "\n".join(map(_markdown, map(self._published_gap, self.gaps)))]
        return "\n\n".join(parts) + "\n"

    @cached_property
    def _requests(self) -> Requests:
        return Requests.of(self.runs, self.original, self.retrained)

    @cached_property
    def _comparisons(self) -> dict[str, Comparison]:
        """What was measured before and after each run that has measures."""
        found = {run.name: run.comparison(self.original) for run in self.runs}
        return {name: each for name, each in found.items() if each is not None}

    @property
    def _same_retrained(self) -> dict[str, Any]:
        """Measures of the retrained model, where they are of the records of all comparisons."""
        alike = all(each.logged for each in self._comparisons.values()) and all(
            same_records(run.result, self.retrained) for run in self.runs
        )
        return measures_of(self.retrained, {}) if alike else {}

    def _published(self, text: str) -> str:
        """A text without the absolute paths of runs and their settings: a page goes to others."""
        known = {place for run in self.runs for place in places([run.folder, run.settings])}
        for place in sorted(known, key=len, reverse=True):
            text = text.replace(place, shown(place))
        return tables.printable(text)

    def _published_gap(self, gap: Gap) -> Gap:
        commands = tuple(map(self._published, gap.commands))
        return replace(gap, how=self._published(gap.how), commands=commands)

    def _measures(self) -> Table:
        """The measures of the rows, with bootstrap intervals of those that have logs."""
        results = {run.name: run.result for run in self.runs if run.result} | self._anchors
        between = {name: intervals_of(result) for name, result in results.items()}
        records = []
        for row in self.rows:
            cells = {name: value for name, value in row.items() if name not in _ABOUT_RUNS}
            for measure in COLUMNS:
                value, interval = row.get(measure.label), between.get(row["run"], {})
                if value is not None and measure.key in interval:
                    cells[measure.label] = Value(value, *interval[measure.key])
            records.append(cells)
        measured = any(
            row.get(measure.label) is not None for row in self.rows for measure in COLUMNS
        )
        return tables.from_records(records) if measured else ([], [])

    def _tradeoff(self) -> svg.Figure | None:
        """Forget quality against model utility; None where no run has both."""
        paths = {}
        for run in self.runs:
            path = [_point(record, "forget_quality", "model_utility") for record in run.evaluations]
            if any(path):
                paths[run.name] = [point for point in path if point]
        drawn = {row["run"]: _point(row, "forget quality", "model utility") for row in self.rows}
        points = {name: point for name, point in drawn.items() if point}
        names = [run.name for run in self.runs]
        finals = {name: points.pop(name) for name in names if name in points}
        return svg.tradeoff(names, paths, finals, points) if paths or finals else None

    def _truth_ratios(self) -> svg.Figure | None:
        """Distributions of the truth ratio; None where no run has any."""
        ratios = {
            run.name: (i, truth_ratio(run.result[FORGET]))
            for i, run in enumerate(self.runs)
            if has_truth_ratio(run.result.get(FORGET, {}))
        }
        anchors = {
            name: truth_ratio(result[FORGET])
            for name, result in reversed(self._anchors.items())
            if has_truth_ratio(result.get(FORGET, {}))
        }
        return svg.truth_ratios(ratios, anchors) if ratios else None

    def _questions(self, part: str) -> list[Question]:
        """Questions of a set, each with the right answer and the answers of the models to it."""
        after = {run.name: run.answers(part, "after") for run in self.runs}
        sampled = [answer for run in self.runs for answer in run.answers(part, "before")]
        before = logged_answers(self.original, part) or sampled
        retrained = logged_answers(self.retrained, part)
        shown: list[list[Question]] = [[]]
        for asked in (sampled, before, *after.values()):
            questions = dict.fromkeys((answer.question, answer.truth) for answer in asked)
            shown.append([
                Question(
                    *each,
                    _answer(before, *each),
                    {name: t for name, a in after.items() if (t := _answer(a, *each)) is not None},
                    _answer(retrained, *each),
                )
                for each in list(questions)[: self.answers]
            ])  # fmt: skip
        # logs may be of other questions than those that the run asked
        return max(shown, key=lambda found: (sum(map(_is_compared, found)), len(found)))

    @cached_property
    def _settings(self) -> dict[str, dict[str, Any]]:
        """The settings of each run; the values are for others to read."""
        return {
            run.name: {
                name: self._published(value) if isinstance(value, str) else value
                for name, value in run.flat_settings().items()
            }
            for run in self.runs
        }

    def _differing(self) -> list[Table]:
        """The settings in which runs differ, in tables of a few columns."""
        shared = self._shared()
        names = [name for name in self._names_of_settings if name not in shared]
        size = _COLUMNS_A_TABLE
        parts = [names[i : i + size] for i in range(0, len(names), size)]
        return [
            ([[run, *map(each.get, part)] for run, each in self._settings.items()], ["run", *part])
            for part in parts
        ]

    def _shared(self) -> dict[str, Any]:
        """The settings that are the same in all runs."""
        runs = list(self._settings.values())
        return {
            name: runs[0].get(name)
            for name in self._names_of_settings
            if len({str(values.get(name)) for values in runs}) == 1
        }

    @property
    def _names_of_settings(self) -> list[str]:
        return list(dict.fromkeys(name for values in self._settings.values() for name in values))


def _row(
    run: RunRecord, measured: Mapping[str, Any], source: str, verdict: Verdict | None
) -> dict[str, Any]:
    """The cells of a run by column."""
    settings = {label: run.number(*path) for label, path in _SETTINGS.items()}
    named = [f"{label} {value:g}" for label, value in settings.items() if value is not None]
    if rho := run.number("training", "sharpness_rho"):  # 0 takes ordinary steps
        named.append(f"sharpness rho {rho:g}")
    if run.steps and (found := run.steps[-1].get("retain_coefficient")) is not None:
        named.append(f"found retain coefficient {found:.3g}")
    if preset := run.setting("method", "preset"):
        named.append(f"preset {preset}")
    return {
        "run": run.name,
        "method": run.method,
        "verdict": None if verdict is None else verdict.outcome,
        **_scores(measured),
        "measured on": source,
        "status": run.metadata.get("status", "unknown"),
        "settings": ", ".join(named),
        "steps": len(run.steps) or None,
        "time [s]": run.time_s,
        "peak memory [MiB]": run.metadata.get("peak_mib"),
        "device": run.metadata.get("versions", {}).get("device"),
    }


def _scores(measured: Mapping[str, Any]) -> dict[str, float | None]:
    return {measure.label: score(measured, measure.key) for measure in COLUMNS}


def _only(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: row.get(name) for name in names}


def _point(scores: Mapping[str, Any], quality: str, utility: str) -> svg.Point | None:
    """Utility and forget quality, as drawn; None where one of them is missing."""
    y, x = scores.get(quality), scores.get(utility)
    return None if y is None or x is None else (x, max(y, svg.SMALLEST))


def _answer(answers: Iterable[Answer], question: str, truth: str) -> str | None:
    """The answer to a question among those of a model."""
    return next((each.text for each in answers if each.answers(question, truth)), None)


def _is_compared(asked: Question) -> bool:
    return asked.before is not None and bool(asked.after)


def _names_by_records(comparisons: Mapping[str, Comparison]) -> dict[str, str]:
    """The runs that were compared on the same records, by these."""
    names: dict[str, list[str]] = {}
    for name, comparison in comparisons.items():
        names.setdefault(comparison.records, []).append(name)
    return {records: some_names(each) for records, each in names.items()}


def _markdown(gap: Gap) -> str:
    sentence = tables.markdown_text(f"{gap.what}: {gap.how}")
    return f"- {' '.join([sentence, *map(tables.code, gap.commands)])}"
