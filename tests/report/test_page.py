"""What stands on the page for each kind of run, in which order, and that everybody can read it."""

import json
import re
from itertools import pairwise

import pytest

from npo_fast.metrics import FORGET, RETAIN, muse, save_result
from npo_fast.reports import svg
from npo_fast.reports.page import Report
from npo_fast.reports.runs import load_runs
from tests.helpers import FACTS, Page, make_result, write_jsonl

LONG = "word " * 300
MISSING = "What is missing, and the command that adds it"
OWN_DATA = ["Verdict", "Before and after", "Example answers", "All measures", "Training curves",
            "Settings", MISSING]  # fmt: skip


class Outline(Page):
    """The headings of a page, and the text of each section."""

    def __init__(self, html):
        self.sections = {}
        super().__init__(html)

    def handle_data(self, data):
        super().handle_data(data)
        if "h2" in self.open:
            self.sections[data] = ""
        elif "section" in self.open and self.sections:
            title = [*self.sections][-1]
            self.sections[title] += data


def sample(probability, answers=FACTS[:4], text="I do not know."):
    rows = [{"question": f["question"], "truth": f["answer"], "answer": text} for f in answers]
    return {"probability": probability, "rouge_l_recall": probability / 2, "answers": rows}


def own_run(folder, steps=3, **changes):
    """The folder of a run on question/answer records without wrong answers."""
    folder.mkdir(parents=True)
    metadata = {
        "id": folder.name,
        "command": "unlearn",
        "status": "finished",
        "settings": {
            "model": {"model": "my-model", "template": "auto", "max_length": 512},
            "data": {"forget": "forget.jsonl", "retain": "retain.jsonl", "loss_on": "last"},
            "method": {"method": "NPO+RT", "kl_positions": "answer"},
            "training": {"lr": 1e-4, "epochs": 10, "batch_size": 32, "seed": 0},
            "report": {"report_records": 20},
        },
        "before": {"forget": sample(0.9), "retain": sample(0.8, text="kept")},
        "after": {"forget": sample(0.1), "retain": sample(0.7, text="kept")},
        "verdict": {"outcome": "forgotten", "reasons": ["forget probability 0.9 -> 0.1"],
                    "advice": ""},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(metadata | changes))
    rows = [{"step": i, "terms": {"NPO": 1 / i}, "log_probs": {"forget": -float(i)},
             "grad_norm": 1.0, "time_ms": 10.0} for i in range(1, steps + 1)]  # fmt: skip
    write_jsonl(folder / "steps.jsonl", rows) if rows else None
    return folder


def report_on(*folders, **more):
    return Report(load_runs(folders), **more)


def muse_logs(rouge, min_k):
    texts = {
        name: {"rougeL_f1": [rouge] * 3, "generated_text": [[prompt, "said", "right"]] * 3}
        for name, prompt in (
            (muse.VERBMEM, "An article begins"),
            (muse.KNOWMEM_FORGET, "Question: Who?\nAnswer: X.\n\nQuestion: Where?\nAnswer: "),
            (muse.KNOWMEM_RETAIN, "Question: When?\nAnswer: "),
        )
    }
    entry = {"conventions": {"min_k_share": muse.MIN_K_SHARE}}
    attacked = {
        muse.PRIVLEAK_FORGET: {"min_k": [min_k - 0.1 * i for i in range(12)], **entry},
        muse.PRIVLEAK_HOLDOUT: {"min_k": [-3.0 - 0.1 * i for i in range(12)], **entry},
    }
    return texts | attacked


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A report on each kind of run, by name."""
    monkeypatch.chdir(tmp_path)
    npo, ga = own_run(tmp_path / "runs/npo"), own_run(tmp_path / "runs/ga", steps=40)
    nothing = {"outcome": "undecided", "reasons": ["nothing was measured"], "advice": "measure it"}
    bare = own_run(tmp_path / "runs/bare", before={}, after={}, verdict=nothing)
    failed = own_run(tmp_path / "runs/failed", status="stopped", error="the loss became NaN")
    full = own_run(tmp_path / "runs/full")
    save_result(make_result(), full / "eval")
    texts = own_run(tmp_path / "runs/muse")
    save_result(muse_logs(0.2, -3.0), texts / "eval")
    return {
        "own": report_on(npo),
        "two": report_on(npo, ga),
        "bare": report_on(bare),
        "failed": report_on(failed),
        "full": report_on(full, original=make_result(), retrained=make_result(shift=0.1)),
        "muse": report_on(texts, original=muse_logs(0.9, -1.0), retrained=muse_logs(0.2, -3.0)),
    }


def test_with_own_data_the_verdict_the_bars_and_the_answers_come_first(pages):
    assert [*Outline(pages["own"].html()).sections] == OWN_DATA
    assert [*Outline(pages["two"].html()).sections] == ["Verdicts", *OWN_DATA[1:]]


def test_no_section_is_empty_and_what_is_missing_comes_last(pages):
    for name, report in pages.items():
        sections = Outline(report.html()).sections
        assert all(text.strip() for text in sections.values()), name
        assert [*sections][-1] == ("Settings" if name == "failed" else MISSING), name
    assert "Before and after" not in Outline(pages["bare"].html()).sections
    assert "Truth ratios" in Outline(pages["full"].html()).sections


def test_the_bars_show_what_was_measured_before_and_after(pages):
    text = " ".join(Page(pages["own"].html()).text.split())
    assert "Forget set: lower means forgotten" in text
    for label, value in (("before", "0.9"), ("after", "0.1"), ("before", "0.8"), ("after", "0.7")):
        assert f"{label} {value}" in text
    assert "Measured on up to 20 records of each set." in text


def test_runs_that_began_alike_share_the_bar_of_the_model_before(pages, tmp_path):
    before = re.compile(r'<li class="before">')
    assert len(before.findall(pages["own"].html())) == 4
    assert len(before.findall(pages["two"].html())) == 4
    other = own_run(tmp_path / "other", before={"forget": sample(0.5), "retain": sample(0.6)})
    page = report_on(tmp_path / "runs/npo", other).html()
    assert len(before.findall(page)) == 8
    assert "before npo" in page
    assert "before other" in page


def test_bars_are_as_long_as_their_values(pages):
    widths = re.findall(r'<rect [^>]*width="([\d.]+)%"', pages["own"].html())
    assert widths == ["90.0", "10.0", "45.0", "5.0", "80.0", "70.0", "40.0", "35.0"]


def test_commands_that_add_what_is_missing_are_short(pages):
    for name, report in pages.items():
        commands = [command for gap in report.gaps for command in gap.commands]
        assert all(len(command) <= 140 for command in commands), name
    (evaluate,) = pages["own"].gaps[0].commands
    assert evaluate == ("npo-fast evaluate --model runs/npo --forget forget.jsonl "
                        "--retain retain.jsonl --output runs/npo/eval")  # fmt: skip
    (again,) = pages["own"].gaps[1].commands
    assert again == ("npo-fast unlearn --model my-model --forget forget.jsonl --retain retain.jsonl"
                     " --lr 0.0001 --output runs/npo-again --eval-every 10")  # fmt: skip
    assert f'<code class="command">{evaluate}</code>' in pages["own"].html()


def test_many_runs_share_the_entries_of_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = report_on(own_run(tmp_path / "runs/a"))
    many = report_on(*(own_run(tmp_path / f"many/{i:02}") for i in range(20)))
    assert len(many.gaps) == len(few.gaps)
    assert many.gaps[0].what == "Measures on all records, of 00, 01, 02 and 17 more"


def test_on_a_phone_each_row_is_a_card_whose_lines_bear_the_columns(pages):
    for name, report in pages.items():
        html = report.html()
        for table in re.findall(r"<table.*?</table>", html, flags=re.DOTALL):
            header = re.findall(r"<th [^>]*>([^<]*)</th>", table)
            for row in re.findall(r'<tr role="row">(?:(?!</tr>).)*<td.*?</tr>', table, re.DOTALL):
                assert re.findall(r'data-label="([^"]*)"', row) == header, name
        narrow = html[html.index("@media screen and (max-width") : html.index("@media print")]
        assert ".data td { display: block; }" in narrow
        assert "content: attr(data-label)" in narrow


def test_every_page_nests_and_loads_nothing(pages):
    for name, report in pages.items():
        html = report.html()
        page = Page(html)
        assert not {"script", "link", "iframe", "img", "style"} & {*page.tags} - {"style"}, name
        assert not re.findall(r"@import|url\((?!#)", html), name
        references = [value for _, key, value in page.attributes if key in ("src", "href")]
        assert not [value for value in references if not value.startswith("#")], name
        ids = [value for _, key, value in page.attributes if key == "id"]
        assert len(ids) == len(set(ids)), name
        flow_in_phrases = re.findall(
            r"<(?:p|h[1-6]|span|summary)\b[^>]*>(?:(?!</).)*<details", html
        )
        assert not flow_in_phrases, name


def test_figures_say_in_words_what_they_show(pages):
    figures = [
        value for tag, key, value in Page(pages["two"].html()).attributes
        if (tag, key) == ("svg", "aria-label")
    ]  # fmt: skip
    assert (
        "NPO loss. npo: 1 at step 1, 0.3333 at step 3; ga: 1 at step 1, 0.025 at step 40" in figures
    )


def test_headings_do_not_skip_a_level(pages):
    for name, report in pages.items():
        levels = [int(tag[1]) for tag in Page(report.html()).tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1, name
        assert all(after <= before + 1 for before, after in pairwise(levels)), name


def test_text_and_lines_stand_out_from_light_and_dark_pages(pages):
    """WCAG AA: 4.5 for text, 3 for the lines and bars of charts."""
    html = pages["own"].html()
    for scheme in re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL):
        colors = dict(re.findall(r"--(\w+): (#\w+)", scheme))
        for background in (colors["page"], colors["box"]):
            for name in ("ink", "soft", "good", "bad", "open"):
                assert contrast(colors[name], background) >= 4.5, (name, background)
        for index in range(9):
            assert contrast(svg.color_of(index), colors["page"]) >= 3, index


def contrast(one, other):
    def luminance(color):
        digits = color[1:] if len(color) == 7 else "".join(c * 2 for c in color[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_run_that_failed_shows_its_error_and_no_verdict(pages):
    section = Outline(pages["failed"].html()).sections["Verdict"]
    assert "Failed" in section
    assert "the loss became NaN" in section
    assert "no longer gives" not in section
    assert not pages["failed"].gaps, "there is no model to evaluate"


def test_many_runs_are_grouped_by_their_outcome(pages, tmp_path):
    lost = {"outcome": "collapsed", "reasons": ["retain gone"], "advice": "unlearn less"}
    runs = [own_run(tmp_path / f"bad{i}", verdict=lost) for i in range(9)]
    html = report_on(*runs, pages["failed"].runs[0].folder, tmp_path / "runs/npo").html()
    section = html[html.index("Verdicts") : html.index("How a verdict")]
    assert section.count('<article class="run">') == 3
    assert section.count("unlearn less") == 1
    assert section.count("retain gone") == 9
    assert "the loss became NaN" in section


def test_a_legend_names_every_run_in_html_where_there_are_several(pages):
    assert '<ul class="legend">' not in pages["own"].html()
    legends = re.findall(r'<ul class="legend">.*?</ul>', pages["two"].html(), flags=re.DOTALL)
    assert len(legends) == 1
    assert re.findall(r'<span dir="auto">(\w+)</span>', legends[0]) == ["npo", "ga"]


def test_more_questions_and_long_answers_are_folded(tmp_path):
    run = own_run(tmp_path / "run", after={"forget": sample(0.1, FACTS[:4], LONG)})
    html = report_on(run).html()
    assert "1 more from the forget set" in html
    shown = re.findall(r'<summary><span dir="auto">(word .*?)</span></summary>', html)
    assert shown
    assert all(len(text) < 500 for text in shown)
    assert (
        "(no answer)"
        in report_on(own_run(tmp_path / "mute", after={"forget": sample(0.1, text="")})).html()
    )


def test_settings_that_differ_stand_beside_each_other_and_the_others_once(pages, tmp_path):
    settings = json.loads((tmp_path / "runs/npo/run.json").read_text())["settings"]
    settings["training"]["lr"] = 0.5
    page = report_on(tmp_path / "runs/npo", own_run(tmp_path / "fast", settings=settings)).html()
    differing = page[
        page.index("Settings that differ") : page.index("Settings that all runs share")
    ]
    assert re.findall(r'data-label="(\w+)"', differing) == ["run", "lr"] * 2
    assert page.count("<dt>batch_size</dt>") == 1
    assert "Settings that differ" not in pages["own"].html()


def test_logs_of_muse_have_their_own_measures_bars_and_verdict(pages):
    report = pages["muse"]
    row, original, _ = report.rows
    assert row["VerbMem forget"] == pytest.approx(0.2)
    assert row["PrivLeak, %"] == pytest.approx(0)
    assert row["verdict"] == "collapsed", "KnowMem of what is kept fell from 0.9 to 0.2"
    assert original["KnowMem retain"] == pytest.approx(0.9)
    text = " ".join(Page(report.html()).text.split())
    assert "Verbatim memorization (VerbMem) before 0.9 after 0.2 retrained 0.2" in text
    assert "Where?" in text
    assert "Question: Where?" not in text, "a question without the examples before it"
    gaps = " ".join(report_on(report.runs[0].folder).missing)
    assert "--suite muse" in gaps
    assert "PrivLeak" in gaps


def test_logs_of_two_suites_are_not_compared(pages):
    folder = pages["muse"].runs[0].folder
    report = report_on(folder, original=make_result(), retrained=make_result())
    assert "different suites" in report.missing[0]
    assert report.rows[0]["VerbMem forget"] == pytest.approx(0.2)


def test_the_markdown_table_has_all_columns_and_what_is_missing(pages):
    markdown = pages["own"].markdown()
    header = next(line for line in markdown.splitlines() if line.startswith("| run"))
    for column in ("method", "verdict", "forget probability", "status", "settings", "steps"):
        assert f"| {column} |" in header
    assert "- Measures on all records, of npo: evaluate it: `npo-fast evaluate" in markdown


def test_a_run_named_like_a_model_to_compare_with_keeps_its_row(tmp_path):
    run = own_run(tmp_path / "original")
    report = report_on(run, original={FORGET: make_result()[FORGET], RETAIN: {}})
    assert [row["run"] for row in report.rows] == ["original", "original"]
    assert report.html()
