"""The README's snippets run as they are printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs_as_printed(number):
    exec(compile(SNIPPETS[number], f"README snippet {number + 1}", "exec"), {})


def test_the_set_up_commands_are_two():
    commands = re.findall(r"^python3 -m venv .*$", README.read_text(), flags=re.MULTILINE)
    assert len(commands) == 2
