"""What docs/methods.md says of methods, coefficients and presets is what the code has."""

import re
from pathlib import Path

import pytest

from npo_fast.methods import COEFFICIENTS, METHODS, PRESETS, coefficients_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
NAMES = re.compile(r"`([^`]+)`")


def rows(header: str) -> list[list[str]]:
    """The cells of the rows below a table's header, which begins so."""
    _, _, rest = PAGE.partition(f"\n{header}")
    lines = rest.partition("\n\n")[0].split("\n")[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def numbers(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"(?<![\w+])\d[\d.]*(?:e-?\d+)?\b", text)]


def test_every_method_is_in_the_table_and_begins_a_section():
    table = rows("| loss on the forget data")
    for parts in (
        [" ".join(cells[2:5]) for cells in table],
        [section.strip().partition("\n\n")[0] for section in sections().values()
         if "Source: arXiv" in section],
    ):  # fmt: skip
        named = [name for text in parts for name in NAMES.findall(text) if name in METHODS]
        assert sorted(named) == sorted(METHODS)
    assert {re.search(r"\[(\w+)\]", cells[0])[1] for cells in table} <= {*sections()}


@pytest.mark.parametrize("name", METHODS)
def test_every_section_has_an_equation_a_use_a_risk_settings_and_evidence(name):
    section = sections()[name.partition("+")[0]]
    for part in ("```text\n", "**Take it**", "**What goes wrong:**", "**Settings:**"):
        assert part in section, part
    assert "**Evidence:**" in section


def test_defaults_of_coefficients_are_those_of_the_code():
    table = rows("| flag | default | methods")
    flags = [flag for cells in table for flag in NAMES.findall(cells[0])]
    assert sorted(flags) == sorted(f"--{c.flag.replace('_', '-')}" for c in COEFFICIENTS.values())
    for cells in table:
        keys = [
            key for key, c in COEFFICIENTS.items() if f"`--{c.flag.replace('_', '-')}`" in cells[0]
        ]
        defaults = [d for key in keys for d in dict.fromkeys(COEFFICIENTS[key].defaults.values())]
        if defaults != [None]:  # that of the layer follows from the model
            assert numbers(cells[1]) == defaults, cells
        for term in re.findall(r"\b[A-Z]\w+(?:O|A|p|U|L)\b", cells[2].replace("`", "")):
            assert all(
                key in coefficients_of(term if term in METHODS else f"{term}+RT") for key in keys
            )


def test_the_preset_table_is_that_of_the_code():
    told = {cells[0]: numbers(cells[1].partition("(")[0]) for cells in rows("| method | `--preset")}
    assert told == {
        name: list(values.values()) for name, values in PRESETS["open-unlearning"].items()
    }
