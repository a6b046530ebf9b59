"""The README stays short, and names what `.ci/run` and others read from it.

Its commands and snippets run in tests/docs/test_pages.py.
"""

import re
from pathlib import Path

import yaml

from npo_fast import __version__

README = Path(__file__).parents[2] / "README.md"


def test_it_is_read_in_two_minutes():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_set_up_commands_are_two():
    commands = re.findall(r"^python3 -m venv .*$", README.read_text(), flags=re.MULTILINE)
    assert len(commands) == 2


def test_the_citation_names_this_version():
    citation = yaml.safe_load((README.parent / "CITATION.cff").read_text())
    assert citation["version"] == __version__
