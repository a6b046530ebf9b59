"""The table of runs, the same in HTML, Markdown and JSON."""

from collections.abc import Mapping
from typing import Any

from npo_fast.errors import UserError
from npo_fast.methods import COEFFICIENTS
from npo_fast.metrics import Result
from npo_fast.metrics.measures import REPORTED, score
from npo_fast.reports.runs import RunRecord

_SETTINGS = {  # label -> path in the settings
    "lr": ("training", "lr"),
    "epochs": ("training", "epochs"),
    "batch": ("training", "batch_size"),
    **{coefficient.label: ("method", coefficient.flag) for coefficient in COEFFICIENTS.values()},
    "seed": ("training", "seed"),
}


def row(run: RunRecord, retrained: Result) -> tuple[dict[str, Any], str]:
    """Cells by column, and why forget quality is missing where logs do not fit together."""
    error_text = ""
    try:
        measured, source = run.measured(retrained)
    except UserError as error:
        error_text = f"{run.name}: {error}"
        measured, source = run.measured({})
    settings = {
        label: setting
        for label, path in _SETTINGS.items()
        if (setting := run.setting(*path)) is not None
    }
    cells = {
        "run": run.name,
        "method": run.method,
        **{measure.label: score(measured, measure.key) for measure in REPORTED},
        "measured on": source,
        "status": run.metadata.get("status", "unknown"),
        "settings": ", ".join(f"{label} {setting:g}" for label, setting in settings.items()),
        "steps": len(run.steps) or None,
        "time [s]": run.time_s,
        "peak memory [MiB]": run.metadata.get("peak_mib"),
        "device": run.metadata.get("versions", {}).get("device"),
    }
    return cells, error_text


def anchor_row(name: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Cells of a model that is only there to compare with."""
    return {
        "run": name,
        **{measure.label: score(measured, measure.key) for measure in REPORTED},
        "measured on": "its logs",
    }
