"""One self-contained HTML page about run folders, and its table in Markdown."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from npo_fast import tables
from npo_fast.errors import UserError
from npo_fast.methods import COEFFICIENTS
from npo_fast.metrics import FORGET, Result, has_truth_ratio, truth_ratio
from npo_fast.metrics.evidence import MEANINGFUL
from npo_fast.metrics.intervals import intervals
from npo_fast.metrics.measures import REPORTED, measures, score
from npo_fast.metrics.verdict import Verdict
from npo_fast.paths import places, shown
from npo_fast.reports import svg
from npo_fast.reports.html import MARK, render
from npo_fast.reports.requests import REQUESTS, Requests
from npo_fast.reports.runs import RunRecord, logged_answers

DEFAULT_BETA = 0.1  # of NPO, where a run names none
_SETTINGS = {  # label in the table -> path in the settings
    "lr": ("training", "lr"),
    "epochs": ("training", "epochs"),
    "batch": ("training", "batch_size"),
    **{coefficient.label: ("method", coefficient.flag) for coefficient in COEFFICIENTS.values()},
    "keep utility": ("training", "keep_utility"),
    "seed": ("training", "seed"),
}


@dataclass
class Report:
    """Runs beside the model they began from and one retrained without the forget set."""

    runs: Sequence[RunRecord]
    original: Result = field(default_factory=dict)
    retrained: Result = field(default_factory=dict)
    answers: int = 20  # how many questions of each set are shown

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []  # cells by column, of runs and models to compare with
        self.verdicts: list[tuple[str, str]] = []  # of each run by name, in full
        self._errors: list[str] = []  # a sentence for each log that cannot be compared
        for run in self.runs:
            try:
                measured, source = run.measured(self.retrained)
            except UserError as error:
                self._errors.append(f"{run.name}: {error}")
                measured, source = run.measured({})
            verdict = self._verdict(run)
            if verdict is not None:
                self.verdicts.append((run.name, str(verdict)))
            self.rows.append(_row(run, measured, source, verdict))
        for name, result in self._anchors.items():
            try:
                measured = measures(result, self.retrained)
            except UserError as error:
                self._errors.append(f"{name}: {error}")
                measured = measures(result)
            self.rows.append({"run": name, **_scores(measured), "measured on": "its logs"})

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
    def missing(self) -> list[str]:
        """What the page lacks, each with the command that makes it; code between backticks."""
        missing = list(self._errors)
        if not self.retrained:
            missing.append(
                "Forget quality and the retrained model's answers: train a model without the "
                "forget set (`npo-fast finetune --model BASE --train RETAIN --output RETRAINED`), "
                "evaluate it on the same records (`npo-fast evaluate --model RETRAINED --forget "
                "FORGET --retain RETAIN --output RETRAINED/eval`), and add `--retrained RETRAINED`"
            )
        elif not _has_ratio(self.retrained):
            missing.append(
                "Forget quality: the retrained model's forget log has no truth ratios; evaluate it "
                "on forget records with `paraphrased_answer` and `perturbed_answer`"
            )
        if not self.original:
            missing.append(
                "The model before unlearning: `npo-fast evaluate --model ORIGINAL --forget FORGET "
                "--retain RETAIN --output ORIGINAL/eval`, and add `--original ORIGINAL`"
            )
        for run in self.runs:
            if not run.result:
                missing.append(f"{run.name}, evaluation logs: `{run.evaluate_command()}`")
            elif not _has_ratio(run.result):
                missing.append(
                    f"{run.name}, truth ratios: its forget records have no wrong answers; give "
                    "them `paraphrased_answer` and `perturbed_answer`, and evaluate again: "
                    f"`{run.evaluate_command(overwrite=True)}`"
                )
            if not run.evaluations and run.metadata.get("command") == "unlearn":
                again = run.command("--eval-every", "10", "--retrained", "RETRAINED")
                how = f" (trains again): `{again}`" if again else ": train again with eval_every"
                missing.append(f"{run.name}, its path over the steps{how}")
            if not run.steps:
                command = f": `{run.command()}`" if run.command() else ""
                missing.append(f"{run.name}, loss curves: no step was recorded{command}")
        return missing + self._requests.missing

    def html(self) -> str:
        """The page as one HTML document without references to other files."""
        return render(
            "report",
            title="Unlearning report",
            about_requests=REQUESTS,
            verdicts=self.verdicts,
            intervals=self._intervals,
            runs=tables.from_records(self.rows),
            tradeoff=self._tradeoff(),
            truth_ratios=self._truth_ratios(),
            has_npo=any("NPO" in step["terms"] for run in self.runs for step in run.steps),
            requests=(*self._requests.table, self._requests.figure()),
            curves=[*self._evaluation_curves(), *self._step_curves()],
            answers={part: self._answers(part) for part in ("forget", "retain") if self.answers},
            settings=self._settings(),
            several_runs=len(self.runs) > 1,
            missing=[self._published(sentence) for sentence in self.missing],
        )

    def markdown(self) -> str:
        """The table of runs, and what is missing."""
        parts = [MARK, "# Unlearning report", tables.markdown(*tables.from_records(self.rows))]
        if self.verdicts:
            lines = (f"- {tables.markdown_text(f'{name}: {text}')}" for name, text in self.verdicts)
            parts += ["Verdicts:", "\n".join(lines)]
        if self._requests.after:
            parts += ["## Requests", REQUESTS, tables.markdown(*self._requests.table)]
        if self.missing:
            sentences = map(tables.markdown_text, map(self._published, self.missing))
            parts += ["Missing:", "\n".join(f"- {sentence}" for sentence in sentences)]
        return "\n\n".join(parts) + "\n"

    @cached_property
    def _requests(self) -> Requests:
        return Requests.of(self.runs, self.original, self.retrained)

    @cached_property
    def _intervals(self) -> tuple[tables.Cells, list[str]]:
        """Rows and header of the bootstrap intervals of all that has logs."""
        results = {run.name: run.result for run in self.runs if run.result} | self._anchors
        labels = {measure.key: measure.label for measure in REPORTED if not measure.needs_retrained}
        rows = []
        for name, result in results.items():
            found = intervals(result, (*labels,))
            low_high = {labels[key]: " to ".join(map(tables.number, v)) for key, v in found.items()}
            rows.append({"run": name, **dict.fromkeys(labels.values()), **low_high})
        return tables.from_records(rows)

    def _published(self, text: str) -> str:
        """A text without the absolute paths of runs and their settings: a page goes to others."""
        known = {place for run in self.runs for place in places([run.folder, run.settings])}
        for place in sorted(known, key=len, reverse=True):
            text = text.replace(place, shown(place))
        return tables.printable(text)

    def _tradeoff(self) -> svg.Figure | None:
        """Forget quality against model utility; None where no run has both."""
        paths = {}
        for run in self.runs:
            path = [_point(record, "forget_quality", "model_utility") for record in run.evaluations]
            if any(path):
                paths[run.name] = [point for point in path if point]
        drawn = {row["run"]: _point(row, "forget quality", "model utility") for row in self.rows}
        points = {name: point for name, point in drawn.items() if point}
        finals = {run.name: points.pop(run.name) for run in self.runs if run.name in points}
        return svg.tradeoff(paths, finals, points) if paths or finals else None

    def _truth_ratios(self) -> svg.Figure | None:
        """Distributions of the truth ratio; None where no run has any."""
        ratios = {
            run.name: (i, truth_ratio(run.result[FORGET]))
            for i, run in enumerate(self.runs)
            if _has_ratio(run.result)
        }
        anchors = {
            name: truth_ratio(result[FORGET])
            for name, result in reversed(self._anchors.items())
            if _has_ratio(result)
        }
        return svg.truth_ratios(ratios, anchors) if ratios else None

    def _evaluation_curves(self) -> Iterator[svg.Figure]:
        for measure in REPORTED:
            is_p = measure.key == "forget_quality"
            least, line = (svg.SMALLEST, MEANINGFUL) if is_p else (-math.inf, None)
            unit = f"KS p-value, {measure.better}" if is_p else measure.better
            series = self._series(
                lambda _, record, key=measure.key: score(record, key), "evaluations", least
            )
            if series:
                key = f"look-{measure.key.replace('.', '-')}"
                yield svg.curves(key, measure.label, unit, series, is_p, line)

    def _step_curves(self) -> Iterator[svg.Figure]:
        yield from self._by_name("log_probs", "log-probability of {} sequences", "nats")
        yield from self._by_name("terms", "{} loss", "before its coefficient")
        if norms := self._series(lambda _, step: step["grad_norm"]):
            yield svg.curves("grad-norm", "Gradient norm", "before clipping", norms, True)
        if weights := self._series(npo_weight):
            yield svg.curves("grad-weight", "Gradient weight of NPO", "at most", weights)

    def _by_name(self, key: str, title: str, unit: str) -> Iterator[svg.Figure]:
        """A figure for each name under ``key`` in the step records."""
        names = dict.fromkeys(name for run in self.runs for step in run.steps for name in step[key])
        for i, name in enumerate(names):
            series = self._series(lambda _, step, name=name: step[key].get(name))
            yield svg.curves(f"{key}-{i}", title.format(name), unit, series)

    def _series(
        self, value: Callable[..., float | None], records: str = "steps", least: float = -math.inf
    ) -> svg.Series:
        """``value(run, record)``, at least ``least``, over the steps of each run that has it."""
        series = {}
        for i, run in enumerate(self.runs):
            points = [
                (record["step"], max(y, least))
                for record in getattr(run, records)
                if (y := value(run, record)) is not None
            ]
            if points:
                series[run.name] = (i, [x for x, _ in points], [y for _, y in points])
        return series

    def _answers(self, part: str) -> list[tuple[str, dict[str, str]]]:
        """Questions of a set, each with the right answer and the answers of the models to it."""
        runs = {run.name: run.answers(part, "after") for run in self.runs}
        before = [answer for run in self.runs for answer in run.answers(part, "before")]
        models = {
            "original": logged_answers(self.original, part) or before,
            **runs,
            "retrained": logged_answers(self.retrained, part),
        }
        asked = next((answers for answers in (before, *runs.values()) if answers), [])
        questions = {(answer.question, answer.truth): None for answer in asked}
        cards = []
        for question, truth in list(questions)[: self.answers]:
            texts = {"truth": truth}
            for name, answers in models.items():
                same = (answer for answer in answers if answer.answers(question, truth))
                if answer := next(same, None):
                    texts[name] = answer.text
            cards.append((question, texts))
        return cards

    def _settings(self) -> tuple[tables.Cells, list[str]]:
        """Rows and header of the settings of each run; those that differ come first."""
        settings = {run.name: run.flat_settings() for run in self.runs}
        names = dict.fromkeys(name for values in settings.values() for name in values)
        rows = [[name, *(values.get(name) for values in settings.values())] for name in names]
        rows = [
            [self._published(cell) if isinstance(cell, str) else cell for cell in row]
            for row in rows
        ]
        rows.sort(key=lambda row: len({str(value) for value in row[1:]}) == 1)
        return rows, ["setting", *settings]


def npo_weight(run: RunRecord, step: Mapping[str, Any]) -> float | None:
    """Bound on the mean gradient weight ``2 p^b / (p^b + p_ref^b)`` of a step.

    A sequence's weight is ``2 (1 - exp(-b L / 2))`` of its NPO loss L: concave, so the mean loss,
    which alone is recorded, bounds the mean weight from above. None where the step has no NPO.
    """
    loss = step["terms"].get("NPO")
    if loss is None:
        return None
    beta = run.number("method", "beta")
    return 2 * -math.expm1(-(DEFAULT_BETA if beta is None else beta) * loss / 2)


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
    return {measure.label: score(measured, measure.key) for measure in REPORTED}


def _point(scores: Mapping[str, Any], quality: str, utility: str) -> svg.Point | None:
    """Utility and forget quality, as drawn; None where one of them is missing."""
    y, x = scores.get(quality), scores.get(utility)
    return None if y is None or x is None else (x, max(y, svg.SMALLEST))


def _has_ratio(result: Result) -> bool:
    return has_truth_ratio(result.get(FORGET, {}))
