"""Texts from data, files and models reach people as text: no terminal or page obeys them."""

import json
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from npo_fast import tables
from npo_fast.cli import main
from npo_fast.cli.console import Output, show, show_messages
from npo_fast.errors import UserError
from npo_fast.model.load import load_config, load_model, load_tokenizer
from npo_fast.paths import below_here, shown
from npo_fast.reports.page import Report
from npo_fast.reports.runs import load_runs
from npo_fast.runs.hub import _without_place, write_card
from npo_fast.runs.progress import progress
from npo_fast.runs.resume import ResumableRun
from tests.helpers import FACTS, metadata_of, save_tiny_model, write_jsonl

EVIL = "a\x1b[2J\x07\rb\x7f\x9b\u202ec\u2028d\ud800"
WRITTEN = "a\\x1b[2J\\x07\\rb\\x7f\\x9b\\u202ec\\u2028d\\ud800"
NAME = "a<b>|`c` [x](javascript:1)*&lt;"


def _message():
    logging.getLogger("npo_fast.data").info(f"reads {EVIL}")


def _warning():
    warnings.warn_explicit(f"reads {EVIL}", UserWarning, "file.py", 1)


def _progress():
    with pytest.MonkeyPatch.context() as patch, progress(EVIL) as update:
        patch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        update("part", 1, 2)


WAYS = {
    "message": _message,
    "warning": _warning,
    "progress bar": _progress,
    "result": lambda: show(Output({}, f"\n{EVIL}\n"), False),
    "table": lambda: show(Output({}, tables.plain([(EVIL, 1.0)], ("name", EVIL))), False),
    "JSON": lambda: show(Output({"name": EVIL}, ""), True),
    "error": lambda: main(["finetune", "--model", "m", "--train", f"{EVIL[:-1]}.jsonl"]),
    "verb": lambda: main([EVIL]),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_control_character_reaches_a_terminal(way, capsys):
    show_messages()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *a, **k: sys.stderr.write(warnings.formatwarning(*a[:4]))
        WAYS[way]()
    out, err = capsys.readouterr()
    printed = out + (err.replace("\r", "") if way == "progress bar" else err)
    assert "2J" in printed
    assert not [c for c in printed if c != "\n" and (ord(c) < 32 or c in "\x7f\x9b\u202e\ud800")]
    if way == "JSON":
        assert json.loads(out) == {"name": EVIL}
    elif way not in ("error", "verb"):
        assert WRITTEN in printed


def test_lines_and_letters_stay_as_they_are():
    text = "Ben\n\tlebt – é🙂 مرحبا 👩‍🚀"
    assert tables.printable(text) == text
    assert tables.plain([("a\nb", 1.0)], ("x", "y")).splitlines()[2].split() == ["a", "b", "1"]


def test_markdown_shows_names_as_they_are():
    *_, row = tables.markdown([(NAME, "_init_ a_b")], ("run", "x")).splitlines()
    assert row == (r"| a&lt;b&gt;\|\`c\` \[x\](javascript:1)\*&amp;lt; | \_init\_ a_b |")
    assert tables.markdown_text("<i>: `<b> *` [x]\n# y`") == r"&lt;i&gt;: `<b> *` \[x\] \# y\`"
    assert tables.code("a``b") == "``` a``b ```"


def run_folder(folder: Path, **settings: object) -> Path:
    """The records of a run that never was."""
    folder.mkdir(parents=True)
    metadata = {
        "command": "unlearn", "status": "finished",
        "settings": {
            "model": {"model": "m"}, "data": {"forget": "f.jsonl"}, "method": {"method": "NPO"},
            "training": {"epochs": 1}, "run": {}, **settings,
        },
        "data": {"forget": {"records": 1, "answer_tokens": 2, "sha256": "0"}},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(metadata))
    (folder / "steps.jsonl").write_text(
        json.dumps({"step": 1, "terms": {"NPO": 1.0}, "log_probs": {}, "grad_norm": 1.0,
                    "time_ms": 1.0}) + "\n"
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", [NAME.replace("/", ""), "_hidden", "$\\frac$", "a\x1b[2Jb"])
def test_the_name_of_a_run_is_text_on_the_page_and_in_markdown(tmp_path, name):
    report = Report(load_runs([run_folder(tmp_path / name)]))
    html, markdown = report.html(), report.markdown()
    assert "a<b>" not in html, "the page has tags of its own"
    assert "\x1b" not in html + markdown
    rows, sentences = markdown.split("Missing:")
    outside = "".join(sentences.split("`")[::2])  # commands stand in code, as they are typed
    for text in (rows, outside if "`" not in name else ""):
        assert "<b>" not in text
        assert "[x](" not in text
    if name == "_hidden":
        assert html.count("_hidden") > html.count("<td>_hidden"), "the legend has it too"


def test_pages_and_cards_show_no_absolute_path(tmp_path, monkeypatch):
    home = tmp_path / "home/ada"
    place = str(home / "secret/m")
    folder = run_folder(
        home / "runs/npo",
        model={"model": place},
        data={"forget": str(home / "secret/f.jsonl[:3]"), "retain": str(tmp_path / "here/r.jsonl")},
        method={"method": "NPO", "reference_cache": str(home / "cache")},
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    report = Report(load_runs([folder]))
    card = folder / "model"
    card.mkdir()
    write_card(card, json.loads((folder / "run.json").read_text()), {})
    for text in (report.html(), report.markdown(), (card / "README.md").read_text()):
        assert "ada" not in text
        assert str(tmp_path) not in text
    assert "--forget '…/f.jsonl[:3]' --retain r.jsonl" in report.markdown()
    assert any(str(folder) in sentence for sentence in report.missing), "the terminal can repeat it"
    assert "starting from `m`" in (card / "README.md").read_text()


def test_a_card_shows_the_name_of_the_base_as_it_is(tmp_path):
    folder = run_folder(tmp_path / "run", model={"model": f"/x/{NAME}"})
    write_card(folder, json.loads((folder / "run.json").read_text()), {})
    body = ModelCard.load(folder / "README.md").text
    assert "<b>" not in body.replace(tables.code(NAME), "")


def test_an_adapter_is_uploaded_without_the_place_of_its_base(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "base"), "r": 2})
    )
    (tmp_path / "new").mkdir()
    uploaded = _without_place(folder, tmp_path / "new")
    assert json.loads((uploaded / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": "base", "r": 2,
    }  # fmt: skip
    assert str(tmp_path) in (folder / "adapter_config.json").read_text(), "here it is found"
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
    assert _without_place(folder, tmp_path) == folder


def test_run_json_has_paths_from_the_working_directory_and_a_run_goes_on_from_another(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    assert below_here(str(tmp_path / "x/m")) == "x/m"
    assert below_here("me/model") == shown("me/model") == "me/model"
    assert (below_here("/far/m"), shown("/far/m")) == ("/far/m", "…/m")
    was = {"settings": {"model": {"model": "x/m"}}}
    resumable = ResumableRun(tmp_path, was, None)
    resumable.check({"settings": {"model": {"model": str(tmp_path / "x/m")}}})
    for other in (str(tmp_path / "y/m"), "m", "y/x/m"):
        with pytest.raises(UserError, match="model is 'x/m' there"):
            resumable.check({"settings": {"model": {"model": other}}})


@pytest.mark.slow
def test_a_run_records_no_absolute_path_of_what_lies_below(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "m")
    forget = write_jsonl(tmp_path / "f.jsonl", FACTS[:2])
    command = ["unlearn", "--model", str(tmp_path / "m"), "--forget", str(forget), "--epochs", "1"]
    output = ["--method", "NPO", "--output", str(tmp_path / "run"), "--no-report"]
    assert main([*command, *output]) == 0
    assert str(tmp_path) not in json.dumps(metadata_of(tmp_path / "run"))


@pytest.fixture
def with_code(tmp_path):
    """A model of an architecture that its own code defines, which leaves a trace."""
    folder = save_tiny_model(tmp_path / "model")
    code = f"open({str(tmp_path / 'ran')!r}, 'w').write('ran')\n"
    code += "from transformers import PretrainedConfig as C, PreTrainedModel as M\n"
    code += (
        "class Config(C):\n    model_type = 'mine'\n\nclass Model(M):\n    config_class = Config\n"
    )
    (folder / "mine.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {
        "AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("load", [load_config, load_model, load_tokenizer])
def test_code_that_comes_with_a_model_is_refused_and_nobody_is_asked(with_code, load, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    with pytest.raises(UserError, match="code of its own, which is never run") as error:
        load(str(with_code))
    assert "\n" not in str(error.value)
    assert not (with_code.parent / "ran").exists()


@pytest.mark.slow
def test_yes_on_standard_input_runs_no_code(with_code, tmp_path):
    forget = write_jsonl(tmp_path / "f.jsonl", FACTS[:2])
    done = subprocess.run(
        [sys.executable, "-m", "npo_fast", "unlearn", "--model", str(with_code), "--forget",
         str(forget), "--method", "NPO", "--output", str(tmp_path / "run")],
        input="yes\n" * 99, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "code of its own, which is never run" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(with_code)
