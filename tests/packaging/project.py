"""The project table of pyproject.toml."""

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2]


def project_table() -> dict[str, Any]:
    """Returns what pyproject.toml says under ``[project]``."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
