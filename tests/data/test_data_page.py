"""What docs/data.md says of each form of data is what happens."""

import importlib
import re
import shlex
from pathlib import Path

from npo_fast.cli.settings import parse
from npo_fast.data import Record, load_records

PAGE = Path(__file__).parents[2] / "docs/data.md"
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAME = Record((("user", "Who wrote Emma?"),), "Jane Austen wrote it.")


def test_every_example_on_the_page_reads_as_it_says(tmp_path, monkeypatch):
    questions, _, rest = PAGE.read_text(encoding="utf-8").partition("## Several answers")
    monkeypatch.chdir(tmp_path)
    names = []
    for _, name, content in BLOCK.findall(questions):
        Path(name).write_text(content)
        assert load_records(name) == [SAME], name
        names.append(name)
    assert len(names) == 10
    scope: dict[str, object] = {}
    programs = 0
    for language, name, content in BLOCK.findall(rest):
        if language == "bash":  # every flag of the command is one
            _, verb, *arguments = shlex.split(content.replace("\\\n", " "))
            parse(importlib.import_module(f"npo_fast.cli.{verb}").Command, arguments, verb, "")
        elif language == "python":
            exec(content, scope)
            programs += 1
        else:
            Path(name).write_text(content)
    assert programs == 4
