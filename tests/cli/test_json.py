"""What ``--json`` prints is what ``docs/command_line.md`` says: keys, and types of values."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from npo_fast.cli import SUBCOMMANDS, main
from tests.helpers import FACTS, save_tiny_model, write_jsonl

PAGE = (Path(__file__).parents[2] / "docs/command_line.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", PAGE, re.M | re.S))
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| (.*?)\|$", re.M)
TYPES = {
    "text": str, "integer": int, "number": (int, float), "boolean": bool, "list": list,
    "object": dict, "null": type(None),
}  # fmt: skip
QUICK = {
    "unlearn": "--model taught --forget forget.jsonl --retain retain.jsonl --epochs 1 "
               "--max-new-tokens 4 --output runs/npo",
    "finetune": "--model taught --train forget.jsonl --epochs 1 --output runs/taught",
    "evaluate": "--model taught --forget forget.jsonl --retain retain.jsonl --max-new-tokens 4",
    "attack": "--model taught --forget forget.jsonl --retain retain.jsonl --epochs 1 "
              "--max-new-tokens 4 --output runs/attack --relearn-share 0.5",
    "report": "runs/npo",
    "plan": "--model taught",
    "doctor": "",
    "reproduce": "--list",
    "completion": "bash",
    "bench": "loss --rows 8 --width 8 --vocabulary 16 --rounds 1 --peers none --inputs random",
    "synthetic": "--quick --seeds 0",
}  # fmt: skip
SLOW = ("attack", "bench", "synthetic")
# the demo takes minutes: tests/experiments/test_demo.py looks at its result
CASES = [pytest.param(v, marks=[pytest.mark.slow] if v in SLOW else []) for v in QUICK]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    save_tiny_model(folder / "taught")
    wrong = [{**f, "perturbed_answer": ["No one.", "Kim."]} for f in FACTS]
    write_jsonl(folder / "forget.jsonl", wrong[6:])
    write_jsonl(folder / "retain.jsonl", wrong[:6])
    return folder


def documented(verb: str) -> dict[str, tuple[str, bool]]:
    """Type and whether it is optional, by key."""
    rows = ROW.findall(SECTIONS[verb])
    return {key: (kind.strip(), "*optional*" in meaning) for key, kind, meaning in rows}


def values(content: Any, path: list[str]) -> Iterator[Any]:
    """Everything that a documented key stands for; KeyError where a name is missing."""
    if not path:
        yield content
        return
    name, rest = path[0], path[1:]
    name, items = name.removesuffix("[]"), name.endswith("[]")
    inner = [*content.values()] if name == "*" else [content[name]]
    for each in inner:
        for part in each if items else [each]:
            yield from values(part, rest)


def check(content: dict[str, Any], verb: str) -> None:
    keys = documented(verb)
    for key, (kinds, optional) in keys.items():
        if optional and key.partition(".")[0] not in content:
            continue
        allowed = tuple(TYPES[kind] for kind in kinds.split(" or "))
        for value in values(content, key.split(".")):
            flag = isinstance(value, bool)
            right = kinds == "boolean" if flag else isinstance(value, _flat(allowed))
            assert right, f"{verb}: {key} is {value!r}, not {kinds}"
    first = {re.split(r"[.\[]", key)[0] for key in keys}
    assert set(content) <= first, f"{verb}: not documented: {set(content) - first}"


def _flat(kinds: tuple[Any, ...]) -> tuple[type, ...]:
    return tuple(k for kind in kinds for k in (kind if isinstance(kind, tuple) else (kind,)))


@pytest.mark.parametrize("verb", CASES)
def test_the_result_has_the_documented_keys_and_types(home, verb, capsys, monkeypatch):
    monkeypatch.chdir(home)
    if verb == "report" and not Path("runs/npo").exists():
        assert main(["unlearn", *QUICK["unlearn"].split()]) == 0
    capsys.readouterr()
    more = ["--overwrite"] if verb in ("unlearn", "finetune") else []
    assert main([verb, *QUICK[verb].split(), *more, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "one object on one line, and nothing else"
    check(json.loads(out), verb)


def test_every_verb_is_documented():
    assert SECTIONS.keys() == SUBCOMMANDS.keys()
    assert {*QUICK, "demo"} == SUBCOMMANDS.keys()


def test_a_dry_run_has_fewer_keys(home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    arguments = QUICK["unlearn"].replace("runs/npo", "runs/dry").split()
    assert main(["unlearn", *arguments, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sentence = re.search(r"With `--dry-run` there are (.*?)\.\n", PAGE, re.S)[1]
    assert set(found) == set(re.findall(r"`(\w+)`", sentence))
    assert found["dry_run"] is True
