"""The README's snippets run as they are printed."""

import re
from pathlib import Path

import pytest
import yaml

from npo_fast import __version__
from tests.helpers import slow_but

README = Path(__file__).parents[2] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", slow_but([0], range(len(SNIPPETS))))
def test_a_snippet_runs_as_printed(number):
    exec(compile(SNIPPETS[number], f"README snippet {number + 1}", "exec"), {})


def test_the_set_up_commands_are_two():
    commands = re.findall(r"^python3 -m venv .*$", README.read_text(), flags=re.MULTILINE)
    assert len(commands) == 2


def test_the_citation_names_this_version():
    citation = yaml.safe_load((README.parent / "CITATION.cff").read_text())
    assert citation["version"] == __version__
