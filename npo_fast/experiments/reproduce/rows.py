"""The rows of ``rows.yaml``, and what a measured number is held against."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any

import yaml

from npo_fast import tables
from npo_fast.errors import UserError

Tolerance = float | str


@dataclass(frozen=True)
class Row:
    """A published row: its numbers by measure, and the commands whose last one measures them."""

    name: str
    what: str
    commands: tuple[str, ...]
    expected: Mapping[str, float]
    tolerance: Mapping[str, Tolerance]
    """Of each measure: absolute, "N %", or "N decades" of a p-value."""
    why: str
    """Where the tolerance comes from."""
    source: str
    needs: str = ""
    data: str = ""
    checkpoint: str = ""
    retrained: str = ""


@dataclass(frozen=True)
class Compared:
    """A measured number beside the published one; NaN where the commands measured none."""

    measure: str
    expected: float
    measured: float
    tolerance: Tolerance
    within: bool


def load_rows() -> dict[str, Row]:
    """Returns every row by its name, in the order of the file."""
    text = files(__package__).joinpath("rows.yaml").read_text(encoding="utf-8")
    rows = [_row(group, own) for group in yaml.safe_load(text) for own in group["rows"]]
    return {row.name: row for row in rows}


def filled(text: str, values: Mapping[str, str]) -> str:
    """The text with values in the places of their names in braces."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _row(group: Mapping[str, Any], own: Mapping[str, Any]) -> Row:
    values = {name: value for name, value in own.items() if name != "expected"}

    texts = ("name", "what", "why", "source", "needs", "data", "checkpoint", "retrained")
    measures = group["measures"]
    return Row(
        **{name: filled(group.get(name, ""), values) for name in texts},
        commands=tuple(filled(command, values) for command in group["commands"]),
        expected=dict(zip(measures, map(float, own["expected"]), strict=True)),
        tolerance=dict(zip(measures, group["tolerance"], strict=True)),
    )


def chosen(rows: Mapping[str, Row], names: Sequence[str]) -> list[Row]:
    """Returns the rows of the names; in a name, ``*`` stands for any characters.

    Raises:
        UserError: a name is that of no row.
    """
    picked: dict[str, Row] = {}
    for name in names:
        found = {known: row for known, row in rows.items() if fnmatchcase(known, name)}
        if not found:
            near = difflib.get_close_matches(name, rows, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "--list shows them"
            raise UserError(f"no published row {name!r}; {hint}")
        picked |= found
    return list(picked.values())


def compare(row: Row, measured: Mapping[str, float]) -> list[Compared]:
    """Returns each published number of a row beside the measured one."""
    found = []
    for measure, expected in row.expected.items():
        value, tolerance = float(measured.get(measure, math.nan)), row.tolerance[measure]
        within = is_within(value, expected, tolerance)
        found.append(Compared(measure, expected, value, tolerance, within))
    return found


def is_within(measured: float, expected: float, tolerance: Tolerance) -> bool:
    """Whether a measured number is as near to the published one as the tolerance says."""
    if isinstance(tolerance, (int, float)):
        return abs(measured - expected) <= tolerance
    number, unit = tolerance.split()
    if unit == "%":
        return abs(measured - expected) <= float(number) / 100 * abs(expected)
    return measured > 0 and abs(math.log10(measured / expected)) <= float(number)


def bound(tolerance: Tolerance) -> str:
    """A tolerance in words: "± 0.01", "within 2 decades", "equal"."""
    return f"within {tolerance}" if isinstance(tolerance, str) else f"± {tolerance:g}"


def commands_of(row: Row) -> list[str]:
    """The commands of a row as they can be typed."""
    places = {
        "data": row.data or "DATA",
        "checkpoint": row.checkpoint,
        "retrained": row.retrained,
        "output": f"npo-fast-reproduce/{row.name}",
    }
    return [filled(command, places) for command in row.commands]


def described(row: Row) -> str:
    """A row as ``--list`` prints it."""
    published = "; ".join(
        f"{name} {tables.number(value)} ({bound(row.tolerance[name])})"
        for name, value in row.expected.items()
    )
    lines = [f"{row.name}: {row.what}"]
    lines += [f"  $ {command}" for command in commands_of(row)]
    lines += [f"  expected   {published}", f"  tolerance  {row.why}", f"  source     {row.source}"]
    if row.needs:
        lines.append(f"  needs      {row.needs}")
    return "\n".join(lines)
