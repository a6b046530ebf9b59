"""All results as Markdown: a table for each table of each part."""

import re
from typing import Any

MOST_ROWS, BRIEF_ROWS = 24, 8  # of one table; the JSON has the rest
MOST_ERRORS, ERROR_CHARACTERS = 15, 160
HIDDEN = {"min_ms", "rounds"}  # columns that only the JSON has
NOT_BRIEF = {
    "error_loss", "error_hidden", "peak_mib", "gb_per_s_with_second_read", "last_loss",
    "last_grad_norm",
}  # fmt: skip
EXCEPTION = re.compile(r"(E +)?[\w.]*(Error|Exception|Exit|Interrupt)\b")

Tables = dict[str, dict[str, dict[str, Any]]]  # table -> row -> column


def markdown(document: dict[str, Any], brief: bool = False) -> str:
    """``brief``: without profiles, and the best rows alone of a long table."""
    lines = [f"# {document['what']}", ""]
    for key in ("date", "commit", "nvidia_smi", "versions", "seconds"):
        value = document.get(key)
        if isinstance(value, dict):
            value = ", ".join(f"{name} {own}" for name, own in value.items())
        if value:
            lines.append(f"- {key}: {value}")
    for number, part in document["parts"].items():
        lines += ["", f"## {number} {part['title']}", "", _states(part["jobs"])]
        for name, rows in joined([job.get("tables", {}) for job in part["jobs"].values()]).items():
            if not (brief and name.startswith("profile")):
                lines += ["", *_table(name, rows, brief)]
        # of all jobs, of which several may have an error by the same name
        found = (item for job in part["jobs"].values() for item in job.get("errors", {}).items())
        errors = list(dict.fromkeys(found))
        if errors:
            lines += ["", "Failed or left out:", ""]
            lines += [_error(name, text) for name, text in errors[:MOST_ERRORS]]
        if len(errors) > MOST_ERRORS:
            lines.append(f"- and {len(errors) - MOST_ERRORS} more in the JSON")
    return "\n".join(lines) + "\n"


def joined(of_jobs: list[Tables]) -> Tables:
    """The tables of several processes as one; counts in the same place add up."""
    tables: Tables = {}
    for own in of_jobs:
        for table, rows in own.items():
            for name, row in rows.items():
                into = tables.setdefault(table, {}).setdefault(name, {})
                for key, value in row.items():
                    both = isinstance(value, int) and key in into
                    into[key] = into[key] + value if both else value
    return tables


def _states(jobs: dict[str, dict[str, Any]]) -> str:
    """How the jobs ended, those that ended alike together."""
    alike: dict[str, list[str]] = {}
    for name, job in jobs.items():
        alike.setdefault(job["status"], []).append(name)
    seconds = max((job.get("seconds", 0) for job in jobs.values()), default=0)
    states = [
        state if names == ["all"] else f"{', '.join(names)} {state}"
        for state, names in alike.items()
    ]
    return f"{'; '.join(states)}; at most {seconds:.0f} s"


def _table(name: str, rows: dict[str, dict[str, Any]], brief: bool) -> list[str]:
    hidden, most = (HIDDEN | NOT_BRIEF, BRIEF_ROWS) if brief else (HIDDEN, MOST_ROWS)
    columns = list(dict.fromkeys(key for row in rows.values() for key in row if key not in hidden))
    shown = list(rows.items())
    if len(shown) > most and "ms" in columns:
        shown.sort(key=lambda item: item[1].get("ms", float("inf")))
    lines = [f"| {name} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for label, row in shown[:most]:
        cells = (_cell(row.get(column, "")) for column in columns)
        lines.append(f"| {label.replace('|', '/')} | {' | '.join(cells)} |")
    if len(shown) > most:
        lines.append(f"\n{len(shown) - most} more rows in the JSON")
    return lines


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def _error(name: str, text: str) -> str:
    """The line of a traceback that names the exception, else the last one."""
    lines = text.strip().splitlines() or ["no message"]
    named = [line for line in lines if EXCEPTION.match(line)]
    return f"- {name}: {(named or lines)[-1][:ERROR_CHARACTERS]}"
