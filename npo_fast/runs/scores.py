"""Measures of a model by name, with the logs behind them; logs in whatever form they come."""

import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Union

from npo_fast import metrics
from npo_fast.errors import CannotSaveError, UserError
from npo_fast.evaluation.harness import Results
from npo_fast.metrics import (
    FORGET,
    HOLDOUT,
    MEASURES,
    LogForm,
    Result,
    examples_in,
    load_result,
    muse,
    save_result,
)
from npo_fast.metrics.evidence import Evidence
from npo_fast.metrics.intervals import intervals
from npo_fast.metrics.measures import Measure, measures
from npo_fast.metrics.verdict import Verdict, judge
from npo_fast.model.save import save_file
from npo_fast.runs.run import Run
from npo_fast.runs.saving import Saving

logger = logging.getLogger(__name__)

LM_EVAL = "lm_eval.json"  # results of lm-evaluation-harness, beside the logs
FEW = 10  # records of a set; the interval of an attack on fewer is chance

Logs = Union[str, Path, Run, "Scores", Result]


class Scores(dict[str, float]):
    """Measures by name, such as "model utility"; ``logs`` holds the values of every record.

    Args:
        retrained: logs of the model trained without the forget set.
        before: measures of the model before unlearning, for the verdict; TOFU's are nested.
        folder: where the logs were saved, if they were.
        lm_eval: results of lm-evaluation-harness, by task and metric.
    """

    def __init__(
        self,
        logs: Result,
        retrained: Result | None = None,
        before: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        lm_eval: Results | None = None,
    ) -> None:
        summary = muse.summary if muse.is_muse(logs) else metrics.summary
        super().__init__(summary(logs, retrained))
        self.lm_eval: Results = lm_eval or {}
        self.logs, self._retrained, self._before = logs, retrained, before or {}
        self.folder = folder

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % bootstrap intervals of measures by name; see ``npo_fast.metrics.intervals``."""
        return {
            self._registry[key].label_of(self.logs): each for key, each in self._between.items()
        }

    @property
    def _registry(self) -> Mapping[str, Measure]:
        return muse.MEASURES if muse.is_muse(self.logs) else MEASURES

    @cached_property
    def _between(self) -> dict[str, tuple[float, float]]:
        return intervals(self.logs, registry=self._registry)

    @cached_property
    def verdict(self) -> Verdict:
        """What came out, with the numbers behind it; see ``npo_fast.metrics.verdict``."""
        if muse.is_muse(self.logs):
            return muse.verdict(self.logs, self._retrained, self._before, self._between)
        attack = "membership_auc.loss"
        few = any(examples_in(self.logs.get(file, {})) < FEW for file in (FORGET, HOLDOUT))
        evidence = Evidence(
            measures(self.logs, self._retrained),
            self._before,
            {} if self._retrained is None else measures(self._retrained),
            {} if few else intervals(self.logs, (attack,)),
            examples_in(self.logs.get(FORGET, {})),
        )
        return judge(evidence)


def save_logs(
    logs: Result,
    folder: Path,
    form: LogForm = "tofu",
    retrained: Result | None = None,
    lm_eval: Results | None = None,
) -> Path | None:
    """Saves logs in ``folder``, or in one of the system's; returns where, None for nowhere.

    What was measured is not lost with them: the measures stay in memory.
    """

    def save(place: Path) -> None:
        if logs:
            save_result(logs, place, form, retrained)
        if lm_eval:
            place.mkdir(parents=True, exist_ok=True)
            text = json.dumps(lm_eval, indent=1)
            save_file(place / LM_EVAL, lambda file: file.write_text(text, encoding="utf-8"))
        else:
            (place / LM_EVAL).unlink(missing_ok=True)

    try:
        saved = Saving().insist(folder, save)
    except CannotSaveError as error:
        logger.warning(f"WARNING: NO LOGS SAVED: {error}")
        return None
    logger.info(f"logs saved in {saved}")
    return saved


def logs_of(logs: Logs, role: str) -> Result:
    """Evaluation logs by name, of whatever the argument ``role`` may be."""
    if isinstance(logs, (str, Path, Run)):
        return load_result(logs.folder if isinstance(logs, Run) else logs)
    if not isinstance(logs, Mapping):
        raise UserError(f"{role} must be a file, a folder, a run, scores or logs, got {logs!r}")
    return logs.logs if isinstance(logs, Scores) else logs
