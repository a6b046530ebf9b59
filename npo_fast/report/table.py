"""The table of runs, the same in HTML, Markdown and JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from npo_fast.errors import UserError
from npo_fast.metrics import Result
from npo_fast.metrics.measures import REPORTED, score
from npo_fast.report.runs import RunRecord

_SETTINGS = {  # of the settings, by the name in the table
    "lr": ("training", "lr"),
    "epochs": ("training", "epochs"),
    "batch": ("training", "batch_size"),
    "beta": ("method", "beta"),
    "gamma": ("method", "gamma"),
    "forget x": ("method", "forget_coefficient"),
    "retain x": ("method", "retain_coefficient"),
    "KL x": ("method", "kl_coefficient"),
    "seed": ("training", "seed"),
}


def row(run: RunRecord, retrained: Result) -> tuple[dict[str, Any], str]:
    """Cells by column, and why forget quality is missing where logs do not fit together."""
    complaint = ""
    try:
        found, source = run.measured(retrained)
    except UserError as error:
        complaint = f"{run.name}: {error}"
        found, source = run.measured({})
    chosen = {
        name: number
        for name, (group, key) in _SETTINGS.items()
        if (number := run.setting(group, key)) is not None
    }
    cells = {
        "run": run.name,
        "method": run.method,
        **{measure.label: score(found, measure.key) for measure in REPORTED},
        "measured on": source,
        "status": run.facts.get("status", "unknown"),
        "settings": ", ".join(f"{name} {number:g}" for name, number in chosen.items()),
        "steps": len(run.steps) or None,
        "time [s]": run.time_s,
        "peak memory [MiB]": run.facts.get("peak_mib"),
        "device": run.facts.get("versions", {}).get("device"),
    }
    return cells, complaint


def anchor_row(name: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """A model that is only there to compare with."""
    return {
        "run": name,
        **{measure.label: score(measured, measure.key) for measure in REPORTED},
        "measured on": "its logs",
    }


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those in which any row has a value."""
    names = dict.fromkeys(name for cells in rows for name in cells)
    return [name for name in names if any(cells.get(name) is not None for cells in rows)]


def text(cell: Any) -> str:
    """A cell: four digits, small p-values as powers of ten, a dash where nothing is known."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.2e}" if 0 < abs(cell) < 1e-3 else f"{cell:.4g}"
    return str(cell)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    names = columns(rows)
    lines = [names, ["---"] * len(names)]
    lines += [[text(cells.get(name)) for name in names] for cells in rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(cell: str) -> str:
    """On one line, with nothing that ends the cell or opens a tag."""
    for old, new in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", " ")):
        cell = cell.replace(old, new)
    return cell
