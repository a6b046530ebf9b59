"""Every command, snippet and file of the documentation works as it is printed."""

import ast
import re

import pytest

import npo_fast
from npo_fast.data import Record, load_records
from tests.docs.pages import BLOCK, ROOT, Page, PageError, on_two, open_page
from tests.docs.world import make_world
from tests.helpers import slow_but

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
QUICK = [DOCS / "data.md", DOCS / "index.md"]
EMMA = Record((("user", "Who wrote Emma?"),), "Jane Austen wrote it.")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # so that run.json names models and data as a reader's does
        make_world()
    return folder


@pytest.mark.parametrize("page", slow_but(QUICK, PAGES), ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_on_a_page_runs_as_printed(page, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_page(page, world, tmp_path).run()


def test_each_form_of_a_question_on_the_data_page_reads_as_the_same_record(tmp_path, monkeypatch):
    questions = (DOCS / "data.md").read_text(encoding="utf-8").partition("## Several answers")[0]
    monkeypatch.chdir(tmp_path)
    page = Page(DOCS / "data.md", tmp_path)
    names = [block["name"] for block in BLOCK.finditer(questions) if block["name"]]
    page.run_text(questions)
    assert len(names) >= 10
    for name in names:
        assert load_records(name) == [EMMA], name


def test_every_public_name_is_in_the_reference():
    reference = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    shown = set(
        re.findall(r"^(?:::: npo_fast\.(?:\w+\.)*| {8}- |### )(\w+)$", reference, re.MULTILINE)
    )
    assert not set(npo_fast.__all__) - shown - {"__version__"}


def test_messages_on_the_page_of_symptoms_are_those_of_the_code():
    files = (ROOT / "npo_fast").rglob("*.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))))
    messages = "\n".join(" ".join(literal_text(node).split()) for node in nodes)
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    blocks = [each.group("language", "name", "code") for each in BLOCK.finditer(page)]
    shown = [code for language, name, code in blocks if (language, name) == ("text", None)]
    assert len(shown) > 30
    for message in shown:
        for part in message.split("…"):  # between values
            words = " ".join(part.split()).strip(" .:;,()")
            assert words in messages, message


def literal_text(node):
    """The text of a string; an f-string has … in the place of its values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(literal_text(part) or "…" for part in node.values)
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if is_text else ""


# --- the harness ----------------------------------------------------------------------------------

WRONG = {
    "a flag that there is not": ("bash", "npo-fast report --modle x", r":4: exit code 2\n.*modle"),
    "a flag of a long command": (
        "bash",
        "npo-fast demo --epochs 3",
        r":4: exit code 2\n(?s:.*)epochs",
    ),
    "a command that fails": ("bash", "npo-fast report nowhere", r":4: exit code 2\n\$ npo-fast"),
    "a shell line that fails": ("bash", "ls nowhere | cat", r":4: exit code 2\n"),
    "an extra that there is not": ("bash", "pip install 'npo-fast[nowt]'", r":4: no extra nowt"),
    "a benchmark's flag": ("bash", "python benchmarks/plan.py --cards 3", r":4: .* has no --cards"),
    "a benchmark": ("bash", "python benchmarks/plane.py", r":4: there is no benchmarks/plane.py"),
    "Python that raises": ("python", "y = 1\nx = 1 / 0", r":5: (?s:.*)ZeroDivisionError"),
    "a language that nothing runs": ("sh", "npo-fast demo", r":3: ```sh: no test runs this"),
    "a file without a name": ("json", "{}", r":3: ```json: no test runs this"),
}


@pytest.mark.parametrize(("language", "code", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_page_is_told_with_its_line(language, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n```{language}\n{code}\n```\n")
    with pytest.raises(PageError, match=r"page\.md" + message):
        Page(page, tmp_path).run()


SHARING = r"""
```text in/a.txt
Ben
```

1. In a list:

    ```bash
    NAME=$(cat in/a.txt)
    echo \
      $NAME > b.txt  # a comment
    ```

```python
x = open("b.txt").read()
```

```python
assert x == "Ben\n"
x = "read"
```
"""


def test_blocks_of_a_page_share_files_variables_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(SHARING)
    opened = Page(page, tmp_path)
    opened.run()
    assert opened.names["x"] == "read"


def test_torchrun_takes_two_processes_of_this_machine():
    assert (
        on_two("torchrun --nnodes 2 --nproc-per-node=8 --rdzv-endpoint a:1 -m npo_fast unlearn")
        == "torchrun --standalone  --nproc-per-node=2  -m npo_fast unlearn"
    )
