"""Figures of the documentation are copies of those that benchmarks draw."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRAWN = {path.name: path for path in (ROOT / "benchmarks/results").rglob("*.png")}
COPIED = [path for path in (ROOT / "docs/images").iterdir() if path.name in DRAWN]


@pytest.mark.parametrize("copy", COPIED, ids=lambda path: path.name)
def test_a_figure_of_the_documentation_is_the_one_of_the_result(copy: Path) -> None:
    drawn = DRAWN[copy.name]
    command = f"cp {drawn.relative_to(ROOT)} docs/images/"
    assert copy.read_bytes() == drawn.read_bytes(), command
