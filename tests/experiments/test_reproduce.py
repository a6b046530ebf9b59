"""Published numbers: every row says where it comes from, and is measured by its own commands."""

import json
import math
import shlex

import pytest

from npo_fast.cli import main, reproduce
from npo_fast.experiments.reproduce.rows import compare, is_within, load_rows
from tests.helpers import FACTS, save_tiny_model, write_jsonl

ROWS = load_rows()


def test_every_row_has_commands_numbers_and_their_source():
    assert len(ROWS) > 50
    for row in ROWS.values():
        assert all((row.source, row.why, row.what)), row.name
        assert row.expected.keys() == row.tolerance.keys(), row.name
        assert all(map(math.isfinite, row.expected.values())), row.name
        assert all(is_within(value, value, row.tolerance[name])
                   for name, value in row.expected.items()), row.name  # fmt: skip
        assert all(shlex.split(line)[0] == "npo-fast" for line in row.commands), row.name
        places = ("{data}", "{checkpoint}", "{retrained}", "{output}")
        for text in (*row.commands, row.name, row.what, row.why, row.source, row.needs):
            for place in places:
                text = text.replace(place, "")
            assert "{" not in text, (row.name, text)


def test_a_tolerance_is_absolute_a_share_or_decades():
    assert is_within(0.51, 0.5, 0.02)
    assert not is_within(0.53, 0.5, 0.02)
    assert is_within(-0.51, -0.5, "3 %")
    assert not is_within(-0.52, -0.5, "3 %")
    assert is_within(3e-22, 1e-20, "2 decades")
    assert not is_within(3e-23, 1e-20, "2 decades")
    assert not is_within(0.0, 1e-20, "2 decades")
    for tolerance in (0.1, "1 %", "1 decades"):
        assert not is_within(math.nan, 1.0, tolerance)


def test_the_list_shows_command_number_tolerance_and_source(capsys):
    assert main(["reproduce", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ROWS)
    assert main(["reproduce", "--list", "tofu-llama-3.2-1b-npo-forget10"]) == 0
    out = capsys.readouterr().out
    for part in ("--method NPO+RT", "forget quality 0.02 (within 2 decades)", "docs/repro.md",
                 "--model open-unlearning/tofu_Llama-3.2-1B-Instruct_full", "needs"):  # fmt: skip
        assert part in out
    assert "{" not in out


def test_published_logs_give_the_published_numbers(tofu_logs, capsys):
    names = ["npo-log-retain90-llama", "npo-log-retain50-against-retain90"]
    assert main(["reproduce", *names, "--data", str(tofu_logs), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == names
    assert all(number["within"] for row in rows for number in row["numbers"])
    assert rows[1]["numbers"][0]["measured"] == pytest.approx(0.8483422371364409, abs=1e-12)


def test_a_number_outside_is_exit_code_1(tofu_logs, tmp_path, capsys):
    log = json.loads((tofu_logs / "retain90_llama.json").read_text())
    losses = log["eval_log.json"]["avg_gt_loss"]
    values = losses if isinstance(losses, dict) else dict(enumerate(losses))
    log["eval_log.json"]["avg_gt_loss"] = {k: v + 1e-6 for k, v in values.items()}
    (tmp_path / "retain90_llama.json").write_text(json.dumps(log))
    assert main(["reproduce", "npo-log-retain90-llama", "--data", str(tmp_path)]) == 1
    assert capsys.readouterr().out.rstrip().endswith("NO")


def test_one_row_that_cannot_be_measured_leaves_the_others(tofu_logs, tmp_path, capsys):
    name = "npo-log-retain90-llama"
    (tmp_path / "retain90_llama.json").symlink_to(tofu_logs / "retain90_llama.json")
    names = ["npo-log-retain95-llama", name]
    assert main(["reproduce", *names, "--data", str(tmp_path), "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert "has no log retain95_llama" in first["error"]
    assert second["numbers"][0]["within"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which published rows to measure, by the names of --list"),
        (["npo-synthetc"], "no published row 'npo-synthetc'; did you mean 'npo-synthetic'?"),
        (["zzz*"], "no published row 'zzz*'; --list shows them"),
        (["npo-log-retain90-llama"], "say where the logs are with --data; it needs the logs in "),
        (["npo-log-retain90-llama", "--data", "/nowhere"], "has no log retain90_llama; it needs"),
    ],
)
def test_mistakes_end_in_one_line_with_the_cure(arguments, message, capsys):
    assert main(["reproduce", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tofu-llama-3.2-1b-forget10", "tofu-llama-3.2-1b-npo-forget10"])
def test_a_row_of_the_hub_runs_on_folders_of_the_same_form(name, tmp_path, capsys):
    """The numbers of a random model mean nothing; all commands of the row run."""
    model = save_tiny_model(tmp_path / "model")
    wrong = [{**fact, "paraphrased_answer": fact["answer"], "perturbed_answer": ["Kim.", "Lee."]}
             for fact in FACTS]  # fmt: skip
    data = tmp_path / "tofu"
    data.mkdir()
    for split, rows in (("forget10", FACTS[6:]), ("forget10_perturbed", wrong[6:]),
                        ("retain90", FACTS[:6]), ("retain_perturbed", wrong[:6]),
                        ("real_authors_perturbed", wrong[:2]),
                        ("world_facts_perturbed", wrong[2:4])):  # fmt: skip
        write_jsonl(data / f"{split}.json", rows)
    call = ["reproduce", name, "--data", str(data), "--model", str(model), "--json",
            "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(call) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    numbers = {number["measure"]: number["measured"] for number in row["numbers"]}
    assert numbers.keys() == ROWS[name].expected.keys()
    assert None not in numbers.values()
    assert main(call) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*call, "--overwrite"]) == 1


def test_the_synthetic_row_reads_the_result_of_its_command():
    row = ROWS["npo-synthetic"]
    claims = [{"holds": True}] * 14 + [{"holds": False}]
    exponents = [{"loss": loss, "axis": axis, "value": value} for loss, axis, value in (
        ("GA", "samples", -0.47), ("NPO", "samples", 0.55), ("GA", "eta", 0.0))]  # fmt: skip
    result = {"claims": claims, "exponents": exponents, "limit_order": 1.0}
    found = {x.measure: x.within for x in compare(row, reproduce._numbers_of(result))}
    assert found.pop("claims that hold") is False
    assert all(found.values())
