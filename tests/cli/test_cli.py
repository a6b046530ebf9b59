"""Whole commands on a tiny model, and what a user's mistakes lead to."""

import json
import math
import resource
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from npo_fast import metrics
from npo_fast.cli import main
from npo_fast.kernels import OPERATORS
from npo_fast.methods import METHODS, build_method
from tests.helpers import (
    FACTS,
    exit_code,
    metadata_of,
    read_jsonl,
    save_tiny_model,
    slow_but,
    write_jsonl,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model that was taught ten facts, and one that was taught the first six."""
    folder = tmp_path_factory.mktemp("home")
    model = save_tiny_model(folder / "base")
    wrong = [{**f, "paraphrased_answer": f"In house {i} lives {f['answer'].split()[0]}.",
              "perturbed_answer": [f"In house {i} lives {n}." for n in ("Kim", "Lee", "Max")],
              "alternate": f"Kim lives in house {i}."}
             for i, f in enumerate(FACTS)]  # fmt: skip
    write_jsonl(folder / "forget.jsonl", wrong[6:])
    write_jsonl(folder / "retain.jsonl", wrong[:6])
    write_jsonl(folder / "all.jsonl", wrong)
    common = ["--epochs", "30", "--batch-size", "5", "--lr", "5e-3"]
    for name, data in (("taught", "all"), ("retrained", "retain")):
        assert main(["finetune", "--model", str(model), "--train", str(folder / f"{data}.jsonl"),
                     "--output", str(folder / name), *common]) == 0  # fmt: skip
    return folder


def unlearn(home: Path, output: Path, *more: str) -> int:
    return main(["unlearn", "--model", str(home / "taught"), "--forget", str(home / "forget.jsonl"),
                 "--retain", str(home / "retain.jsonl"), "--output", str(output), "--epochs", "6",
                 "--lr", "3e-3", "--batch-size", "4", "--max-new-tokens", "8", *more])  # fmt: skip


def test_a_model_is_finetuned_unlearned_and_evaluated(home, tmp_path, capsys):
    assert unlearn(home, tmp_path / "npo", "--json", "--save-every", "2") == 0
    out = json.loads(capsys.readouterr().out)
    before, after = out["before"], out["after"]
    assert before["forget"]["probability"] > 0.8, "taught"
    assert after["forget"]["probability"] < 0.5 * before["forget"]["probability"], "forgotten"
    assert after["retain"]["probability"] > after["forget"]["probability"]

    run = metadata_of(tmp_path / "npo")
    assert run["status"] == "finished"
    assert run["settings"]["method"]["method"] == "NPO+RT"
    assert run["data"]["forget"]["examples"] == 4
    assert len(run["data"]["retain"]["sha256"]) == 64
    assert run["versions"]["torch"] == torch.__version__
    steps = [json.loads(x) for x in (tmp_path / "npo/steps.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(1, 7))
    assert (tmp_path / "npo/checkpoints/step-000004/model.safetensors").exists()
    assert not (tmp_path / "npo/checkpoints/step-000002").exists(), "only the newest is kept"

    for name in ("retrained", "npo"):
        where = home / name if name == "retrained" else tmp_path / name
        more = [] if name == "retrained" else ["--retrained", str(tmp_path / "eval-retrained")]
        assert main(["evaluate", "--model", str(where), "--forget", str(home / "forget.jsonl"),
                     "--retain", str(home / "retain.jsonl"), "--max-new-tokens", "8", "--json",
                     "--output", str(tmp_path / f"eval-{name}"), *more]) == 0  # fmt: skip
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert 0 <= numbers["forget quality"] <= 1
    assert numbers["forget probability"] < 0.5
    log = metrics.load_result(tmp_path / "eval-npo")[metrics.FORGET]
    assert len(log["generated_text"]) == 4
    assert len(log["average_perturb_loss"][0]) == 3


def test_what_is_saved_is_a_plain_hugging_face_model(home):
    folder = home / "taught/model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Question: Who lives in house 3?\nAnswer:", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=6, do_sample=False)[0])
    assert "Dan lives in house 3" in answer
    assert "npo_fast" not in (folder / "config.json").read_text()


def test_another_run_is_not_overwritten_by_accident(home, tmp_path, capsys):
    assert unlearn(home, tmp_path / "run", "--no-report") == 0
    first = (tmp_path / "run/steps.jsonl").read_text()
    assert unlearn(home, tmp_path / "run", "--seed", "1") == 2
    assert "nothing was done. Add --overwrite to delete it" in capsys.readouterr().err
    assert (tmp_path / "run/steps.jsonl").read_text() == first
    assert unlearn(home, tmp_path / "run", "--seed", "1", "--overwrite", "--no-report") == 0
    assert (tmp_path / "run/steps.jsonl").read_text() != first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    assert unlearn(home, tmp_path / "mine", "--overwrite") == 2
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("method", slow_but(["DPO"], METHODS))
def test_every_method_runs_by_name_and_twice_the_same(home, tmp_path, method):
    """Two steps each; DPO and its kin draw the same refusals from the same seed."""
    for name in ("one", "two"):
        assert unlearn(home, tmp_path / name, "--method", method, "--epochs", "2", "--no-report",
                       "--micro-batch-tokens", "64") == 0  # fmt: skip
    one, two = (read_jsonl(tmp_path / name / "steps.jsonl") for name in ("one", "two"))
    assert len(one) == 2
    assert all(math.isfinite(record["loss"]) for record in one)
    for record in one + two:
        del record["time_ms"]
    assert one == two
    facts = metadata_of(tmp_path / "one")
    read = {source for term in build_method(method) for source in term.reads}
    assert read <= set(facts["data"]), "each source that it reads has its fingerprint"


@pytest.mark.slow
def test_refusals_and_alternates_come_from_the_files_that_are_named(home, tmp_path):
    refusals = tmp_path / "idk.txt"
    refusals.write_text("Who knows?\n")
    others = [{"question": f["question"], "answer": "Max."} for f in FACTS[6:]]
    alternates = write_jsonl(tmp_path / "others.jsonl", others)
    for method, flag, file in (("DPO", "--idk", refusals), ("AltPO", "--alternate", alternates)):
        seen = []
        for i, more in enumerate(([], [flag, str(file)])):
            assert unlearn(home, tmp_path / f"{method}{i}", "--method", method, "--epochs", "1",
                           "--no-report", *more) == 0  # fmt: skip
            data = metadata_of(tmp_path / f"{method}{i}")["data"]
            seen.append({name: of["sha256"] for name, of in data.items()})
        changed = {name for name in seen[0] if seen[0][name] != seen[1][name]}
        assert changed == {"idk" if method == "DPO" else "alternate"}


def test_alternating_steps_and_coefficients_from_the_command_line(home, tmp_path):
    assert unlearn(home, tmp_path / "run", "--method", "satimp+rt", "--beta1", "2", "--beta2", "0",
                   "--forget-coefficient", "0.5", "--retain-coefficient", "2", "--schedule",
                   "alternating", "--epochs", "2", "--no-report") == 0  # fmt: skip
    steps = [json.loads(x) for x in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    assert [list(s["terms"]) for s in steps] == [["SatImp"], ["retain NLL"]] * 2
    assert steps[0]["loss"] == pytest.approx(0.5 * steps[0]["terms"]["SatImp"])
    assert steps[1]["loss"] == pytest.approx(2 * steps[1]["terms"]["retain NLL"])
    assert metadata_of(tmp_path / "run")["steps"] == len(steps) == 4


def test_a_dry_run_checks_and_writes_nothing(home, tmp_path, capsys):
    assert unlearn(home, tmp_path / "dry", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    assert not (tmp_path / "dry").exists()
    assert unlearn(home, tmp_path / "dry", "--dry-run", "--method", "NPU") == 2


def test_json_output_has_null_where_a_number_is_infinite(home, tmp_path, capsys):
    capsys.readouterr()
    assert unlearn(home, tmp_path / "dry", "--dry-run", "--json", "--max-grad-norm", "inf") == 0
    output = capsys.readouterr().out
    assert not {"Infinity", "NaN"} & set(output.replace(",", " ").split())
    assert json.loads(output)["settings"]["training"]["max_grad_norm"] is None


def test_flags_override_the_settings_file(home, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("method: GA+RT\nlr: 1e-3\nepochs: 1\nretain_coefficient: 2\n")
    assert main(["unlearn", "--config", str(settings), "--model", str(home / "taught"),
                 "--forget", str(home / "forget.jsonl"), "--retain", str(home / "retain.jsonl"),
                 "--output", str(tmp_path / "run"), "--no-report",
                 "--epochs", "2"]) == 0  # fmt: skip
    used = metadata_of(tmp_path / "run")["settings"]
    assert used["method"]["method"] == "GA+RT"
    assert used["method"]["retain_coefficient"] == 2.0
    assert used["training"]["lr"] == 1e-3
    assert used["training"]["epochs"] == 2


MISTAKES = {
    "unknown choice": (["--dtype", "bf61"], "did you mean 'bf16'"),
    "unknown verb": (["unlern"], "did you mean 'unlearn'"),
    "unknown method": (["--method", "NPO+RR"], "did you mean NPO+RT"),
    "unknown split": (["--forget", "nowhere"], "no file 'nowhere'"),
    "no retain data": (["--no-retain"], "NPO+RT keeps what --retain names"),
    "nothing to forget": (["--forget", ""], "say what to forget with --forget"),
    "no such model": (["--model", "./nowhere"], "no model folder './nowhere'"),
    "bad learning rate": (["--lr", "-1"], "lr must be positive, got -1.0"),
    "bad beta": (["--beta", "0"], "beta must be positive"),
    "foreign coefficient": (["--delta", "1"], "NPO+RT has no delta; these have: SimNPO, SimNPO+RT"),
    "no refusals": (
        ["--idk", "none.txt", "--method", "DPO"],
        "cannot read refusals from 'none.txt'",
    ),
    "no alternates": (["--alternate", "none", "--method", "AltPO"], "no file 'none'"),
    "one-sided turns": (["--schedule", "alternating", "--method", "NPO"], "a method with +RT"),
    "bad template": (["--template", "chat"], "no chat template"),
    "no room for answers": (["--max-length", "4"], "raise --max-length"),
    "bad value in YAML": (["--config", "bad.yaml"], "bad.yaml says --lr=fast"),
    "no number in YAML": (["--config", "null.yaml"], "epochs is None, expected int"),
    "unknown key in YAML": (
        ["--config", "typo.yaml"],
        "typo.yaml: unknown setting metod; did you mean method?",
    ),
    "no YAML": (["--config", "none.yaml"], "no settings file 'none.yaml'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_in_one_line_and_exit_code_2(home, tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("lr: fast\n")
    Path("null.yaml").write_text("epochs: null\n")
    Path("typo.yaml").write_text("metod: GA\n")
    changed, message = MISTAKES[case]
    arguments = {
        "--model": str(home / "taught"),
        "--forget": str(home / "forget.jsonl"),
        "--retain": str(home / "retain.jsonl"),
        "--output": "run",
    }
    if changed == ["--no-retain"]:
        del arguments["--retain"]
    elif changed[0].startswith("--"):
        arguments |= zip(changed[::2], changed[1::2], strict=True)
    verb = "unlearn" if changed[0].startswith("--") else changed[0]
    assert exit_code([verb, *(x for pair in arguments.items() for x in pair)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("run").exists()


@pytest.mark.slow
def test_a_failed_save_keeps_the_earlier_model(home, tmp_path, capsys):
    """As on a full disk: the limit on the size of a file stops the writing half way."""
    assert unlearn(home, tmp_path / "run", "--no-report") == 0
    weights = tmp_path / "run/model/model.safetensors"
    before = weights.read_bytes()

    from npo_fast.errors import UserError
    from npo_fast.model.load import load_model, load_tokenizer
    from npo_fast.runs.saved_model import save_model

    lm, tokenizer = load_model(str(home / "base")), load_tokenizer(str(home / "base"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="cannot save.*what was there before is untouched"):
            save_model(lm, tokenizer, tmp_path / "run/model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert weights.read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "model", "run.json", "steps.jsonl",
    ]  # fmt: skip


def test_a_tokenizer_of_another_model_is_refused(home, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(home / "taught/model", mixed)
    tokenizer = AutoTokenizer.from_pretrained(mixed)
    tokenizer.add_tokens(["house"])
    tokenizer.save_pretrained(mixed)
    assert main(["finetune", "--model", str(mixed), "--train", str(home / "all.jsonl"),
                 "--output", str(tmp_path / "run")]) == 2  # fmt: skip
    assert "do not belong together" in capsys.readouterr().err


def test_a_diverging_run_keeps_the_last_good_model(home, tmp_path, capsys):
    assert unlearn(home, tmp_path / "run", "--no-report", "--method", "GA", "--lr", "1e30",
                   "--warmup-steps", "0") == 1  # fmt: skip
    error = capsys.readouterr().err
    assert "step 2: the loss is" in error or "step 3: the loss is" in error
    assert "forget records" in error
    run = metadata_of(tmp_path / "run")
    assert run["status"] == "stopped"


def test_evaluating_existing_logs_needs_no_model(tofu_logs, capsys):
    assert main(["evaluate", "--log", str(tofu_logs / "retain50_llama.json"), "--retrained",
                 str(tofu_logs / "retain90_llama.json"), "--json"]) == 0  # fmt: skip
    numbers = json.loads(capsys.readouterr().out)["metrics"]
    assert numbers["forget quality"] == pytest.approx(0.8483422371364409, abs=1e-12)
    assert main(["evaluate", "--log", str(tofu_logs / "retain99_llama.json"), "--retrained",
                 str(tofu_logs / "retain90_llama.json")]) == 2  # fmt: skip


def test_the_doctor_names_a_kernel_for_every_operator(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["kernels"]) == set(OPERATORS)
    assert all(on["cpu"] for on in found["kernels"].values())
