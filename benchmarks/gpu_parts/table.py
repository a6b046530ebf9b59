"""All results as Markdown: a table for each table of each part."""

import re
from typing import Any

MOST_ROWS = 24  # of one table; the JSON has the rest
HIDDEN = ("min_ms", "rounds")  # columns that only the JSON has
EXCEPTION = re.compile(r"(E +)?[\w.]*(Error|Exception|Exit|Interrupt)\b")
MOST_ERRORS, ERROR_CHARACTERS = 15, 160


def markdown(document: dict[str, Any]) -> str:
    lines = [f"# {document['what']}", ""]
    for key in ("date", "commit", "nvidia_smi", "versions", "seconds"):
        if document.get(key):
            value = document[key]
            if isinstance(value, dict):
                value = ", ".join(f"{name} {own}" for name, own in value.items())
            lines.append(f"- {key}: {value}")
    for number, part in document["parts"].items():
        jobs = part["jobs"]
        states = dict.fromkeys(_state(name, job) for name, job in jobs.items())
        lines += ["", f"## {number} {part['title']}", "", "; ".join(states)]
        for name, rows in joined([job.get("tables", {}) for job in jobs.values()]).items():
            lines += ["", *_table(name, rows)]
        errors = {k: v for job in jobs.values() for k, v in job.get("errors", {}).items()}
        if errors:
            lines += ["", "Failed or left out:", ""]
            lines += [_error(name, text) for name, text in list(errors.items())[:MOST_ERRORS]]
        if len(errors) > MOST_ERRORS:
            lines.append(f"- and {len(errors) - MOST_ERRORS} more in the JSON")
    return "\n".join(lines) + "\n"


def joined(of_jobs: list[dict[str, dict]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The tables of several processes as one; counts in the same place add up."""
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for own in of_jobs:
        for table, rows in own.items():
            for name, row in rows.items():
                into = tables.setdefault(table, {}).setdefault(name, {})
                for key, value in row.items():
                    both = isinstance(value, int) and key in into
                    into[key] = into[key] + value if both else value
    return tables


def _state(name: str, job: dict[str, Any]) -> str:
    state = job["status"]
    if "seconds" in job:
        state += f" after {job['seconds']:.0f} s"
    return state if name == "all" else f"{name} {state}"


def _table(name: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row if key not in HIDDEN))
    shown = list(rows.items())
    if len(shown) > MOST_ROWS and "ms" in columns:
        shown.sort(key=lambda item: item[1].get("ms", float("inf")))
    lines = [f"| {name} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for label, row in shown[:MOST_ROWS]:
        cells = (_cell(row.get(column, "")) for column in columns)
        lines.append(f"| {label.replace('|', '/')} | {' | '.join(cells)} |")
    if len(shown) > MOST_ROWS:
        lines.append(f"\n{len(shown) - MOST_ROWS} more rows in the JSON")
    return lines


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def _error(name: str, text: str) -> str:
    """The line of a traceback that names the exception, else the last one."""
    lines = text.strip().splitlines() or ["no message"]
    named = [line for line in lines if EXCEPTION.match(line)]
    return f"- {name}: {(named or lines)[-1][:ERROR_CHARACTERS]}"
