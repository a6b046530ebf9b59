"""The page about runs: every part that it promises, nothing from outside, and what is missing."""

import json
import re
import shlex
from dataclasses import replace

import pytest

from npo_fast.cli import main
from npo_fast.metrics import FORGET, save_result
from npo_fast.reports.curves import npo_weight
from npo_fast.reports.page import Report
from npo_fast.reports.runs import load_run
from tests.helpers import FACTS, Page, make_result, metadata_of, save_tiny_model, write_jsonl

MISSING = "What is missing, and the command that adds it"
EVIL = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A taught model, a log to compare with, one run with everything and one with nothing."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "base")
    rows = [{**f, "paraphrased_answer": f["answer"], "perturbed_answer": ["Kim.", "Lee lives."]}
            for f in FACTS]  # fmt: skip
    rows[6]["answer"] = EVIL
    data = folder / "data"
    data.mkdir()
    for name, part in (("forget", rows[6:]), ("retain", rows[:6]),
                       ("real_authors", rows[:2]), ("world_facts", rows[2:4])):  # fmt: skip
        write_jsonl(data / f"{name}.jsonl", part)
    sets = ["--data", str(data), "--forget", "forget", "--retain", "retain"]
    short = ["--max-new-tokens", "4"]
    base = ["--model", str(folder / "base"), *sets, *short]
    assert main(["evaluate", *base, "--output", str(folder / "log")]) == 0
    unlearn = ["unlearn", *base, "--epochs", "4", "--batch-size", "4", "--lr", "3e-3"]
    assert main([*unlearn, "--output", str(folder / "full"), "--eval-every", "2",
                 "--retrained", str(folder / "log")]) == 0  # fmt: skip
    assert main(["evaluate", "--model", str(folder / "full"), *sets, *short,
                 "--output", str(folder / "full/eval")]) == 0  # fmt: skip
    assert main([*unlearn, "--method", "GA", "--no-report", "--output", str(folder / "bare")]) == 0
    return folder


def report(home, tmp_path, *runs, logs=True):
    log = str(home / "log")
    more = ["--original", log, "--retrained", log] if logs else []
    names = [str(home / run) for run in runs]
    output = tmp_path / "report.html"
    assert main(["report", *names, *more, "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8")


def table_of(markdown):
    """Header and rows by column of the one table."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(line) for line in cells}) == 1
    assert set(cells[1]) == {"---"}
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


@pytest.mark.slow
def test_a_run_with_everything_shows_every_part_and_misses_nothing(home, tmp_path):
    page = Page(report(home, tmp_path, "full"))
    for title in ("Verdict", "Before and after", "Example answers", "From the forget set",
                  "From the retain set", "All measures", "Forgetting against utility",
                  "Truth ratios", "Measures during training", "Training curves",
                  "Settings"):  # fmt: skip
        assert title in page.texts
    assert MISSING not in page.texts
    figures = [
        value.partition(".")[0]
        for tag, name, value in page.attributes
        if (tag, name) == ("svg", "aria-label")
    ]
    assert {"Forget quality against model utility", "Truth ratio on the forget set",
            "Forget quality", "Model utility", "Gradient norm", "Gradient weight of NPO",
            "NPO loss", "Retain NLL loss",
            "Log-probability of forget sequences"} <= set(figures)  # fmt: skip
    for text in ("Right answer", "Before", "After", "Retrained", "retrained", FACTS[7]["answer"]):
        assert text in page.texts


@pytest.mark.slow
def test_the_page_is_self_contained_and_its_ids_are_unique(home, tmp_path):
    html = report(home, tmp_path, "full", "bare")
    page = Page(html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "@import" not in html
    links = [v for _, name, v in page.attributes if name in ("src", "href", "xlink:href", "style")]
    assert links
    assert not [v for v in links if "//" in v]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", html))
    assert used <= set(ids)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


@pytest.mark.slow
def test_axes_take_the_colour_of_the_page(home, tmp_path):
    html = report(home, tmp_path, "full")
    svg = html[html.index("<svg") : html.rindex("</svg>")]
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "#000000" not in svg
    assert "prefers-color-scheme: dark" in html


@pytest.mark.slow
def test_text_from_outside_is_escaped(home, tmp_path):
    folder = tmp_path / "a<script>|b"
    folder.mkdir()
    facts = metadata_of(home / "full")
    facts["settings"]["method"]["method"] = EVIL
    facts["versions"]["device"] = "a|b\\"
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "steps.jsonl").write_text((home / "full/steps.jsonl").read_text())
    page = Page(report(home, tmp_path, "full", folder))
    assert "script" not in page.tags
    assert EVIL in page.texts, "an answer, as it reads"
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in "".join(x for x in markdown.splitlines() if x.startswith("|"))
    assert table_of(markdown)[1]["device"] == r"a\|b\\"


@pytest.mark.slow
def test_what_is_missing_is_named_with_its_command(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    page = Page(report(home, tmp_path, "bare", logs=False))
    assert MISSING in page.texts
    assert ("npo-fast evaluate --model bare --data data --forget forget --retain retain "
            "--output bare/eval") in page.texts  # fmt: skip
    again = next(text for text in page.texts if text.startswith("npo-fast unlearn"))
    assert "--eval-every 10" in again
    assert "--method GA" in again
    assert "--overwrite" not in again, "the run that is there stays"
    assert any("runs/retrained/eval" in text for text in page.texts)
    assert "NPO loss" not in page.text
    markdown = (tmp_path / "report.md").read_text()
    assert "- Measures on all records, of bare: evaluate it: `npo-fast evaluate" in markdown


def test_the_command_that_trains_again_asks_for_the_same_settings(home, capsys):
    run = load_run(home / "full", "full")
    words = shlex.split(run.command("--dry-run", "--json"))
    capsys.readouterr()
    assert main(words[1:]) == 0
    planned = json.loads(capsys.readouterr().out)["settings"]
    for group in ("model", "data", "method", "training"):
        assert planned[group] == run.settings[group]
    assert len(words) < 30, "settings that have their default are left out"


def test_no_command_is_named_for_a_method_of_ones_own(home):
    run = load_run(home / "full", "full")
    own = replace(run, metadata=run.metadata | {"terms": ["Term(...)"]})
    assert own.command("--dry-run") is None


@pytest.mark.slow
def test_the_markdown_table_holds_the_measures(home, tmp_path, capsys):
    capsys.readouterr()
    log = str(home / "log")
    output = str(tmp_path / "report.html")
    assert main(["report", str(home / "full"), str(home / "bare"), "--retrained", log,
                 "--output", output, "--json"]) == 0  # fmt: skip
    shown = json.loads(capsys.readouterr().out)
    rows = table_of((tmp_path / "report.md").read_text())
    assert [row["run"] for row in rows] == ["full", "bare", "retrained"]
    assert [row["method"] for row in rows] == ["NPO+RT", "GA", "–"]
    assert rows[0]["measured on"].startswith("eval/ logs, ")
    assert float(rows[0]["model utility"]) == pytest.approx(
        shown["runs"][0]["model utility"], rel=1e-3
    )
    assert rows[2]["forget quality"] == "1"
    assert rows[1]["forget quality"] == "–"
    assert shown["markdown"] == str(tmp_path / "report.md")


@pytest.mark.slow
def test_logs_of_other_items_are_reported_and_the_rest_is_shown(home, tmp_path):
    save_result(make_result(items=9), tmp_path / "other")
    output = tmp_path / "report.html"
    assert main(["report", str(home / "full"), "--retrained", str(tmp_path / "other"),
                 "--output", str(output)]) == 0  # fmt: skip
    text = Page(output.read_text()).text
    assert "the unlearned log has 4 forget items and the retrained log 9" in text


def test_retrained_logs_without_truth_ratios_are_told_once(tmp_path):
    save_result(make_result(), tmp_path / "run/eval")
    (tmp_path / "run/run.json").write_text('{"status": "finished"}')
    retrained = {FORGET: {"avg_gt_loss": [1.0] * 6}}
    report = Report([load_run(tmp_path / "run", "run")], make_result(), retrained)
    told = [sentence for sentence in report.missing if "truth ratio" in sentence]
    assert [sentence.partition(":")[0] for sentence in told] == ["Forget quality"]
    assert "retrained model's forget log has no truth ratios" in told[0]
    assert all(row["forget quality"] is None for row in report.rows)
    assert [row["model utility"] is None for row in report.rows] == [False, False, True]


@pytest.mark.slow
def test_published_logs_without_answers_will_do(home, tmp_path):
    """Columns as objects keyed by index, no texts."""
    save_result(make_result(items=4, as_objects=True), tmp_path / "published")
    output = tmp_path / "report.html"
    assert main(["report", str(home / "full"), "--retrained", str(tmp_path / "published"),
                 "--output", str(output)]) == 0  # fmt: skip
    assert "Truth ratio on the forget set" in output.read_text()


@pytest.mark.slow
def test_a_run_that_goes_on_is_shown_as_far_as_it_is(home, tmp_path):
    folder = tmp_path / "running"
    folder.mkdir()
    facts = metadata_of(home / "full")
    for name in ("final", "before", "after", "ended"):
        facts.pop(name)
    (folder / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    (folder / "steps.jsonl").write_text((home / "full/steps.jsonl").read_text()[:-20])
    run = load_run(folder, "running")
    assert len(run.steps) == len((home / "full/steps.jsonl").read_text().splitlines()) - 1
    assert "running" in Page(report(home, tmp_path, folder)).texts


def test_the_gradient_weight_is_one_at_the_start_and_falls(home):
    run = load_run(home / "full", "full")
    weights = [npo_weight(run, step) for step in run.steps]
    assert weights[0] == pytest.approx(1, abs=1e-3)
    assert weights[-1] < weights[0]
    assert npo_weight(run, {"terms": {"GA": 1.0}}) is None


def test_mistakes_end_in_a_clear_error(home, tmp_path, capsys):
    full, page = str(home / "full"), str(tmp_path / "report.html")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/run.json").write_text("{")
    for arguments, message in (
        ([str(tmp_path)], "is not a run folder, it holds no run.json"),
        ([], "name one run folder or more"),
        ([full, full], "named twice"),
        ([str(tmp_path / "damaged")], "is damaged"),
        ([full, "--output", str(tmp_path / "mine.html")], "is not a report of npo-fast"),
        ([full, "--output", str(tmp_path / "report.pdf")], "must end in .html"),
        ([full, "--retrained", str(tmp_path / "none")], "no evaluation log"),
        ([full, "--answers", "-1"], "--answers must be 0 or more"),
    ):
        more = [] if "--output" in arguments else ["--output", page]
        assert main(["report", *arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"


def test_runs_of_one_name_are_told_apart_by_their_folders(home, tmp_path):
    for place in ("a", "b"):
        folder = tmp_path / place / "npo"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text((home / "full/run.json").read_text())
    report(home, tmp_path, tmp_path / "a/npo", tmp_path / "b/npo")
    rows = table_of((tmp_path / "report.md").read_text())
    assert [row["run"] for row in rows][:2] == ["a/npo", "b/npo"]
