"""Requests that came one after another: how likely the answers of each are after later ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npo_fast import tables
from npo_fast.errors import UserError
from npo_fast.metrics import FORGET, Result, probability
from npo_fast.metrics.logs import same_records
from npo_fast.metrics.measures import measures, score
from npo_fast.reports import svg
from npo_fast.reports.gaps import Gap
from npo_fast.reports.runs import RunRecord, load_run
from npo_fast.run_files import RUN, forgotten_by, requests_of

REQUESTS = (
    "How likely the answers of each request still are, after it and after later requests: the mean "
    "probability of the right answers. Each row is the model after one request. Forgotten answers "
    "should stay close to the retrained model's value, and the utility close to the original's."
)


@dataclass
class Requests:
    """What is measured of the longest chain among some runs."""

    requests: Sequence[Mapping[str, Any]] = ()  # ``run_files.Request``
    after: dict[str, tuple[dict[int, float], float | None]] = field(default_factory=dict)
    missing: list[Gap] = field(default_factory=list)

    @classmethod
    def of(cls, runs: Sequence[RunRecord], original: Result, retrained: Result) -> "Requests":
        """The chain of the run with the most requests; empty of fewer than two.

        Earlier runs that were not named are looked for where they were, and beside the last one.
        """
        last = max(runs, key=lambda run: len(requests_of(run.metadata)))
        requests = requests_of(last.metadata)
        if len(requests) < 2:
            return cls()
        found = cls(requests)
        salt = last.metadata["chain"]["salt"]
        known = {run.metadata.get("id"): run for run in runs}
        logged: list[RunRecord] = []
        for number, request in enumerate(requests, 1):
            run = known.get(request["run"]) or _find(request, last.folder)
            name = f"{number}: {request['method']}, {request['folder']}"
            if run is None:
                found.missing.append(
                    Gap(f"Request {name}", "its folder is not where it was: name it in the report")
                )
            elif run.logged.get("salt") != salt or FORGET not in run.result:
                found.missing.append(
                    Gap(
                        f"Request {name}: how much of it and of earlier requests is left",
                        "evaluate on the records of all requests:",
                        ("cat requests/*.jsonl > ALL", run.evaluate_command(True, forget="ALL")),
                    )
                )
            else:
                logged.append(run)
                found.after[name] = found._measured(run.result, run.logged["forget"])
        for name, result in {"original": original, "retrained": retrained}.items():
            same = (run for run in logged if same_records(result, run.result))
            if FORGET in result and (run := next(same, None)):
                found.after[name] = found._measured(result, run.logged["forget"])
        if "original" in found.after:
            found.after = {"original": found.after.pop("original"), **found.after}
        return found

    def _measured(
        self, result: Result, digests: Sequence[Sequence[str]]
    ) -> tuple[dict[int, float], float | None]:
        """The mean probability of the records of each request, by its number, and the utility."""
        values, by_request = probability(result[FORGET]), {}
        if len(values) != len(digests):
            raise UserError(
                f"evaluation logs hold {len(values)} forget records, and the file beside them "
                f"{len(digests)}: evaluate again"
            )
        for number, request in enumerate(self.requests, 1):
            if places := forgotten_by(request, digests):
                by_request[number] = float(values[places].mean())
        return by_request, score(measures(result), "model_utility")

    @property
    def table(self) -> tuple[tables.Cells, list[str]]:
        """A row a model, a column a request."""
        columns = {number: f"P(request {number})" for number in range(1, len(self.requests) + 1)}
        rows = [
            {
                "after request": name,
                **{label: values.get(number) for number, label in columns.items()},
                "model utility": utility,
            }
            for name, (values, utility) in self.after.items()
        ]
        return tables.from_records(rows)

    def figure(self) -> svg.Figure | None:
        """A curve a request over the models."""
        if not self.after:
            return None
        return svg.curves(
            "requests", "Answers of each request", "mean probability", dict(self._curves()),
            log=True, x_label="requests so far",
        )  # fmt: skip

    def _curves(self) -> Iterator[tuple[str, tuple[int, list[float], list[float]]]]:
        steps = {name: int(name.split(":")[0]) for name in self.after if name[0].isdigit()}
        steps |= {"original": 0} if "original" in self.after else {}
        for number in range(1, len(self.requests) + 1):
            points = {steps[name]: self.after[name][0].get(number) for name in steps}
            drawn = {x: y for x, y in points.items() if y is not None}
            if drawn:
                yield f"request {number}", (number - 1, [*drawn], [*drawn.values()])
        utility = {steps[name]: self.after[name][1] for name in steps}
        if drawn := {x: y for x, y in utility.items() if y is not None}:
            yield "model utility", (len(self.requests), [*drawn], [*drawn.values()])


def _find(request: Mapping[str, Any], beside: Path) -> RunRecord | None:
    """The run of a request, where its folder still holds it."""
    folder = Path(request["folder"])
    for place in (folder, beside.resolve().parent / folder.name):
        if (place / RUN).is_file():
            run = load_run(place, place.name)
            if run.metadata.get("id") == request["run"]:
                return run
    return None
