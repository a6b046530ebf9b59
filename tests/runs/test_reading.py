"""How rows become records reaches every verb, and is on record; sets that repeat are told."""

import gzip
import json

import pytest

import npo_fast
from npo_fast.attacks.options import AttackOptions
from npo_fast.cli import main
from npo_fast.errors import UserError
from npo_fast.evaluation.suite import tofu_suite
from npo_fast.reports.runs import load_run
from npo_fast.runs.options import RunOptions
from tests.helpers import FACTS, save_tiny_model, write_jsonl

TURNS = [
    {"messages": [{"role": role, "content": fact[key]} for fact in pair
                  for role, key in (("user", "question"), ("assistant", "answer"))]}
    for pair in zip(FACTS[::2], FACTS[1::2], strict=True)
]  # fmt: skip
DRY = RunOptions(dry_run=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("home") / "base")


def examples(run: npo_fast.Run) -> dict[str, int]:
    return {name: each["examples"] for name, each in run.metadata["data"].items()}


def test_loss_on_all_makes_a_record_of_every_answer_in_every_verb(base, tmp_path):
    turns = str(write_jsonl(tmp_path / "turns.jsonl", TURNS))
    sets = {"forget": TURNS[:2], "retain": f"{turns}[2:]", "run": DRY, "output": tmp_path / "run"}
    assert examples(npo_fast.unlearn(str(base), **sets)) == {"forget": 2, "retain": 3}
    run = npo_fast.unlearn(str(base), **sets, loss_on="all")
    assert examples(run) == {"forget": 4, "retain": 6}
    assert run.metadata["settings"]["data"]["loss_on"] == "all"
    run = npo_fast.finetune(str(base), train=turns, loss_on="all", run=DRY)
    assert examples(run) == {"train": 10}
    settings = npo_fast.EvaluationSettings(max_new_tokens=1)
    scores = npo_fast.evaluate(str(base), forget=turns, loss_on="all", evaluation=settings)
    assert len(scores.logs["eval_log_forget.json"]["avg_gt_loss"]) == 10
    attacks = AttackOptions(attacks="quantize", bits="8", max_new_tokens=1)
    attacked = npo_fast.attack(str(base), forget=f"{turns}[:1]", loss_on="all", attacks=attacks,
                               output=tmp_path / "attack")  # fmt: skip
    assert len(attacked["before"].logs["eval_log_forget.json"]["avg_gt_loss"]) == 2
    with pytest.raises(UserError, match="loss_on must be 'last' or 'all', got 'first'"):
        npo_fast.unlearn(str(base), **sets, loss_on="first")


def test_commands_and_reports_take_loss_on(base, tmp_path, capsys):
    turns = str(write_jsonl(tmp_path / "turns.jsonl", TURNS[:2]))
    command = ["unlearn", "--model", str(base), "--forget", turns, "--method", "NPO", "--no-report",
               "--epochs", "1", "--output", str(tmp_path / "run"), "--loss-on", "all"]  # fmt: skip
    assert main(command) == 0
    assert "forget: 4 records" in capsys.readouterr().err
    record = load_run(tmp_path / "run", "run")
    assert "--loss-on all" in record.command()
    assert "--loss-on all" in record.evaluate_command()


def test_wrong_answers_are_found_beside_files_of_every_kind(tmp_path):
    rows = [{**fact, "perturbed_answer": ["Nobody."]} for fact in FACTS]
    for suffix in ("jsonl", "jsonl.gz"):
        for name, content in (("facts", FACTS), ("facts_perturbed", rows)):
            text = "".join(json.dumps(row) + "\n" for row in content).encode()
            packed = gzip.compress(text) if suffix.endswith("gz") else text
            (tmp_path / f"{name}.{suffix}").write_bytes(packed)
        (records,) = tofu_suite(None, f"{tmp_path}/facts.{suffix}[:3]", None).values()
        assert [record.perturbed_answers for record in records] == [("Nobody.",)] * 3


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        (FACTS[6:], "2 of 4 forget records are retain records too"),
        ([FACTS[8], FACTS[9], FACTS[9]], "1 of 3 forget records repeat another one, such as rec"),
        (FACTS[8:], ""),
    ],
)
def test_a_run_tells_of_records_in_both_sets_and_twice(base, tmp_path, capsys, forget, message):
    rows = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
            for name, rows in (("forget", forget), ("retain", FACTS[:8]))}  # fmt: skip
    assert main(["unlearn", "--model", str(base), "--forget", rows["forget"], "--retain",
                 rows["retain"], "--output", str(tmp_path / "run"), "--dry-run"]) == 0  # fmt: skip
    said = capsys.readouterr().err
    assert ("warning:" in said) == bool(message)
    assert message in said


def test_an_evaluation_tells_of_a_holdout_that_was_to_be_forgotten(base, tmp_path, capsys):
    forget, holdout = (
        str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
        for name, rows in (("forget", FACTS[:3]), ("holdout", FACTS[2:5]))
    )
    assert main(["evaluate", "--model", str(base), "--forget", forget, "--holdout", holdout,
                 "--max-new-tokens", "1"]) == 0  # fmt: skip
    assert "1 of 3 forget records are holdout records too" in capsys.readouterr().err
