"""One self-contained HTML page, and its table in Markdown, from run folders."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from npo_fast._version import __version__
from npo_fast.errors import UserError
from npo_fast.metrics import FORGET, Result, has_truth_ratio, truth_ratio
from npo_fast.metrics.measures import REPORTED, measures, score
from npo_fast.report import svg, table
from npo_fast.report.figures import MEANINGFUL, Point
from npo_fast.report.markup import MARK, PAGE, code, html_table, note, side_by_side
from npo_fast.report.runs import RunRecord, logged_answers

DEFAULT_BETA = 0.1  # of NPO, where a run names none
_BOUND = (
    "The gradient weight of NPO scales each sequence's gradient beside that of gradient ascent: "
    "1 at the start, near 0 once a sequence is forgotten. Drawn is 2 (1 - exp(-beta * loss / 2)) "
    "of the mean loss of a step, which the mean weight cannot exceed."
)
_READ = (
    "Forget quality is the p-value of a test against a model retrained without the forget set: "
    "above 0.05 the two cannot be told apart. Model utility (0 to 1) is what was kept. Forget "
    "measures should come down to those of the retrained model, retain measures stay up."
)

Series = dict[str, tuple[int, list[float], list[float]]]  # run -> its index, x, y


@dataclass
class Report:
    """Runs beside the model they began from and one retrained without the forget set."""

    runs: Sequence[RunRecord]
    original: Result = field(default_factory=dict)
    retrained: Result = field(default_factory=dict)
    answers: int = 20  # shown of each set

    @cached_property
    def _table(self) -> tuple[list[dict[str, Any]], list[str]]:
        found = [table.row(run, self.retrained) for run in self.runs]
        rows, complaints = [cells for cells, _ in found], [why for _, why in found if why]
        for name, result in (("original", self.original), ("retrained", self.retrained)):
            if result:
                try:
                    rows.append(table.anchor_row(name, measures(result, _or_none(self.retrained))))
                except UserError as error:
                    complaints.append(f"{name}: {error}")
                    rows.append(table.anchor_row(name, measures(result)))
        return rows, complaints

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The cells of every run and anchor, by column."""
        return self._table[0]

    @cached_property
    def missing(self) -> list[str]:
        """What the page lacks, each with the command that makes it; code between backticks."""
        found = list(self._table[1])
        if not self.retrained:
            found.append(
                "Forget quality and the retrained model's answers: train a model without the "
                "forget set (`npo-fast finetune --model BASE --train RETAIN --output RETRAINED`), "
                "evaluate it on the same records (`npo-fast evaluate --model RETRAINED --forget "
                "FORGET --retain RETAIN --output RETRAINED/eval`), and add `--retrained RETRAINED`"
            )
        if not self.original:
            found.append(
                "The model before unlearning: `npo-fast evaluate --model ORIGINAL --forget FORGET "
                "--retain RETAIN --output ORIGINAL/eval`, and add `--original ORIGINAL`"
            )
        for run in self.runs:
            if not run.result:
                found.append(f"{run.name}, evaluation logs: `{run.evaluate_command()}`")
            elif not _has_ratio(run.result):
                found.append(
                    f"{run.name}, truth ratios: its forget records have no wrong answers; give "
                    "them `paraphrased_answer` and `perturbed_answer`, and evaluate again: "
                    f"`{run.evaluate_command()} --overwrite`"
                )
            if not run.looks and run.facts.get("command") == "unlearn":
                again = run.command("--eval-every", "10", "--retrained", "RETRAINED")
                found.append(f"{run.name}, its path over the steps (trains again): `{again}`")
            if not run.steps:
                found.append(f"{run.name}, loss curves: no step was recorded: `{run.command()}`")
        return found

    def html(self) -> str:
        return PAGE.substitute(
            mark=MARK,
            title="Unlearning report",
            version=__version__,
            sections="\n".join(
                f"<section>\n<h2>{title}</h2>\n{body}\n</section>"
                for title, body in self._sections()
                if body
            ),
        )

    def markdown(self) -> str:
        parts = [MARK, "# Unlearning report", table.markdown(self.rows)]
        if self.missing:
            parts += ["Missing:", "\n".join(f"- {one}" for one in self.missing)]
        return "\n\n".join(parts) + "\n"

    def _sections(self) -> Iterator[tuple[str, str]]:
        yield "Runs", f"<p>{_READ}</p>\n" + html_table(table.columns(self.rows), self.rows)
        yield "Forgetting and what it costs", self._tradeoff()
        yield "Truth ratios", self._truth_ratios()
        yield "Over the steps", self._curves()
        for part in ("forget", "retain"):
            yield f"Answers to the {part} set", self._answers(part)
        yield "Settings", self._settings()
        items = "\n".join(f"<li>{code(one)}</li>" for one in self.missing)
        yield "Missing", f'<ul class="missing">\n{items}\n</ul>' if items else ""

    def _tradeoff(self) -> str:
        paths = {
            run.name: [
                Point(look["step"], look["forget_quality"], look.get("model_utility"))
                for look in run.looks
                if "forget_quality" in look
            ]
            for run in self.runs
        }
        points = {row["run"]: _point(row) for row in self.rows}
        names = {run.name for run in self.runs}
        finals = {name: p for name, p in points.items() if p and name in names}
        anchors = {name: p for name, p in points.items() if p and name not in names}
        drawn = {
            name: path
            for name, path in paths.items()
            if any(p.model_utility is not None for p in path)
        }
        if not drawn and not finals:
            return note("No run has both forget quality and model utility yet; see Missing.")
        text = (
            "Up and right is better. Above the dashed line (0.05) the model cannot be told from "
            "the retrained one. Small markers: evaluations while training, on the first records "
            "of each set; large: the final model, on what the table says. Fewer records make the "
            "test weaker, so p-values of another number of records do not compare."
        )
        return f"<p>{text}</p>\n<figure>{svg.tradeoff(drawn, finals, anchors)}</figure>"

    def _truth_ratios(self) -> str:
        ratios = {
            run.name: (i, truth_ratio(run.result[FORGET]))
            for i, run in enumerate(self.runs)
            if _has_ratio(run.result)
        }
        anchors = {
            name: truth_ratio(result[FORGET])
            for name, result in (("retrained", self.retrained), ("original", self.original))
            if _has_ratio(result)
        }
        if not ratios:
            return note("No run has evaluation logs with wrong answers; see Missing.")
        text = (
            "Share of forget items at or below each truth ratio. Forget quality tests the largest "
            "vertical gap to the retrained model: curves that lie on each other are good."
        )
        return f"<p>{text}</p>\n<figure>{svg.truth_ratios(ratios, anchors)}</figure>"

    def _curves(self) -> str:
        figures = [*self._look_curves(), *self._step_curves()]
        if not figures:
            return note("No run has step records; see Missing.")
        text = f"<p>{_BOUND}</p>\n" if self._weights() else ""
        grid = "\n".join(f"<figure>{figure}</figure>" for figure in figures)
        return f'{text}<div class="grid">\n{grid}\n</div>'

    def _look_curves(self) -> Iterator[str]:
        for measure in REPORTED:
            series = self._series(lambda _, look, key=measure.key: score(look, key), "looks")
            if not series:
                continue
            key = f"look-{measure.key.replace('.', '-')}"
            heading = measure.label[0].upper() + measure.label[1:]
            if measure.key == "forget_quality":
                floored = {
                    name: (i, x, [max(p, svg.SMALLEST) for p in y])
                    for name, (i, x, y) in series.items()
                }
                yield svg.curves(
                    key, heading, "KS p-value, higher is better", floored, True, MEANINGFUL
                )
            else:
                yield svg.curves(key, heading, measure.better, series)

    def _step_curves(self) -> Iterator[str]:
        yield from self._by_name("log_probs", "log-probability of a {} sequence", "nats")
        yield from self._by_name("terms", "{} loss", "before its coefficient")
        if norms := self._series(lambda _, step: step["grad_norm"]):
            yield svg.curves("grad-norm", "Gradient norm", "before clipping", norms, log=True)
        if weights := self._weights():
            yield svg.curves("grad-weight", "Gradient weight of NPO", "at most", weights)

    def _by_name(self, key: str, title: str, unit: str) -> Iterator[str]:
        names = dict.fromkeys(name for run in self.runs for step in run.steps for name in step[key])
        for i, name in enumerate(names):
            series = self._series(lambda _, step, name=name: step[key].get(name))
            heading = title.format(name)
            yield svg.curves(f"{key}-{i}", heading[0].upper() + heading[1:], unit, series)

    def _weights(self) -> Series:
        return self._series(npo_weight)

    def _series(self, value: Any, records: str = "steps") -> Series:
        """``value(run, record)`` over the steps of each run that has it at any."""
        series: Series = {}
        for i, run in enumerate(self.runs):
            found = [(one["step"], value(run, one)) for one in getattr(run, records)]
            points = [(x, y) for x, y in found if y is not None]
            if points:
                series[run.name] = (i, [x for x, _ in points], [y for _, y in points])
        return series

    def _answers(self, part: str) -> str:
        runs = {run.name: run.answers(part, "after") for run in self.runs}
        before = [answer for run in self.runs for answer in run.answers(part, "before")]
        columns = {
            "original": logged_answers(self.original, part) or before,
            **runs,
            "retrained": logged_answers(self.retrained, part),
        }
        asked = next((answers for answers in (before, *runs.values()) if answers), [])
        if not asked:
            return note("No run has answers to these; see Missing.")
        shown = list({(one.question, one.truth): one for one in asked}.values())[: self.answers]
        return "\n".join(side_by_side(one, columns) for one in shown)

    def _settings(self) -> str:
        found = {run.name: {**dict(run.flat_settings()), **_origin(run)} for run in self.runs}
        names = dict.fromkeys(name for values in found.values() for name in values)
        rows = [
            {"setting": name, **{run: values.get(name) for run, values in found.items()}}
            for name in names
        ]
        rows.sort(key=lambda row: len({str(row[run]) for run in found}) == 1)
        text = "<p>Those in which runs differ come first.</p>\n" if len(found) > 1 else ""
        return text + html_table(["setting", *found], rows)


def npo_weight(run: RunRecord, step: Mapping[str, Any]) -> float | None:
    """Bound on the mean gradient weight ``2 p^b / (p^b + p_ref^b)`` of a step.

    A sequence's weight is ``2 (1 - exp(-b L / 2))`` of its NPO loss L: concave, so the mean loss,
    which alone is recorded, bounds the mean weight from above. None where the step has no NPO.
    """
    loss = step["terms"].get("NPO")
    if loss is None:
        return None
    beta = run.setting("method", "beta")
    return 2 * -math.expm1(-(DEFAULT_BETA if beta is None else beta) * loss / 2)


def _point(row: Mapping[str, Any]) -> Point | None:
    quality, utility = row.get("forget quality"), row.get("model utility")
    return None if quality is None or utility is None else Point(0, quality, utility)


def _or_none(retrained: Result) -> Result | None:
    return retrained if _has_ratio(retrained) else None


def _has_ratio(result: Result) -> bool:
    return has_truth_ratio(result.get(FORGET, {}))


def _origin(run: RunRecord) -> dict[str, Any]:
    """What else can change a number: versions, and fingerprints of the data."""
    data = run.facts.get("data", {})
    return {
        **run.facts.get("versions", {}),
        "attention kernel": run.facts.get("attention"),
        **{f"{name} data, SHA-256": str(of.get("sha256"))[:12] for name, of in data.items()},
    }
