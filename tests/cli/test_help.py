"""Help is short, plain and complete; a wrong option is answered with the right one."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import npo_fast
from npo_fast import TrainSettings, UserError, unlearn
from npo_fast.cli import SUBCOMMANDS, main
from npo_fast.cli.completion import completion
from npo_fast.cli.fields import options_of
from npo_fast.cli.settings import Common, parse
from npo_fast.cli.subcommands import module_of, options_of_verb
from npo_fast.suggestions import ELSEWHERE, normal, options_in
from tests.helpers import exit_code

FLAGS = {verb: {normal(o.flag) for o in options_of_verb(verb)} for verb in SUBCOMMANDS}
COMMON = {normal(option.flag) for option in options_of(Common)}


def shown(capsys, *arguments: str) -> str:
    assert exit_code([*arguments]) == 0
    return capsys.readouterr().out


# ---- help ----


@pytest.mark.parametrize("verb", SUBCOMMANDS)
def test_short_help_has_an_example_and_the_first_options(verb, capsys):
    out, about = shown(capsys, verb, "--help"), SUBCOMMANDS[verb]
    example = " ".join(out.partition("Example:")[2].partition("Options")[0].split())
    assert example.replace("\\ ", "") == about.example
    assert 1 <= len(about.first) <= 6
    listed = re.findall(r"^  --([\w-]+)", out, re.M)
    flags = {o.name: o.flag for o in options_of_verb(verb) if not o.positional}
    assert {f"--{name}" for name in listed} == {flags.get(n, f"--{n}") for n in about.first} - {
        f"--{option.name}" for option in options_of_verb(verb) if option.positional
    }
    assert f"npo-fast {verb} --help-all" in out


@pytest.mark.parametrize("verb", SUBCOMMANDS)
def test_the_whole_help_has_every_option_and_says_what_it_is_for(verb, capsys):
    out = shown(capsys, verb, "--help-all")
    for option in options_of_verb(verb):
        assert option.help[-1:] in [".", "?"], f"{option.flag} has no help, or half a sentence"
        assert (option.argument if option.positional else option.flag) in out
    for odd in ("``", "None", "{", "default: )", "╭"):
        assert odd not in out
    assert all(len(line) <= 80 for line in out.splitlines()), out


@pytest.mark.parametrize("verb", SUBCOMMANDS)
def test_examples_are_commands_that_the_parser_takes(verb, tmp_path, monkeypatch):
    words = shlex.split(SUBCOMMANDS[verb].example.partition(">")[0])
    assert words[:2] == ["npo-fast", verb]
    parse(module_of(verb).Command, words[2:], verb)


def test_the_overview_has_every_verb_and_the_exit_codes(capsys):
    out = shown(capsys)
    assert out == shown(capsys, "--help")
    assert all(f"  {verb} " in out and each.help in out for verb, each in SUBCOMMANDS.items())
    assert all(code in out for code in ("0 it", "1 it", "2 a", "70 a", "128 + N"))
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_switch_is_described_by_what_it_does(capsys):
    help_of = {option.flag: option.help for v in SUBCOMMANDS for option in options_of_verb(v)}
    assert help_of["--no-generate"].startswith("Write no answers")
    assert help_of["--no-report"].startswith("Skip")
    assert (
        "(default" not in shown(capsys, "evaluate", "--help-all").partition("--no-generate")[2][:90]
    )


# ---- suggestions ----


def test_every_suggestion_is_an_option_of_some_verb():
    every = set().union(COMMON, *FLAGS.values())
    for name, meant in ELSEWHERE.items():
        assert name == normal(name)
        assert name not in every, f"{name} is an option itself"
        for text in meant:
            flags = options_in(text)
            assert flags, text
            assert {*flags} <= every, text
            verbs = [v for v in SUBCOMMANDS if {*flags} <= FLAGS[v] | COMMON]
            if re.fullmatch(r"--[\w-]+ \w+", text):  # the value is one that it takes
                verb = "unlearn" if "unlearn" in verbs else verbs[0]
                parse(module_of(verb).Command, ["--model", "m", *text.split()], verb)


MEANT = {
    "--learning-rate": "--lr", "--lr_rate": "--lr", "--lr-rate": "--lr", "--epoch": "--epochs",
    "--num-epochs": "--epochs", "--num-train-epochs": "--epochs", "--num_train_epochs": "--epochs",
    "--batchsize": "--batch-size", "--batch": "--batch-size",
    "--per-device-train-batch-size": "--batch-size", "--forget-set": "--forget",
    "--forget-data": "--forget", "--retain-set": "--retain", "--beta-auto": "--beta auto",
    "--output-dir": "--output", "--ouput": "--output", "--save-steps": "--save-every",
    "--eval-steps": "--eval-every", "--model-name-or-path": "--model", "--bf16": "--dtype bf16",
    "--torch-dtype": "--dtype", "--lora-r": "--lora-rank", "--lora_r": "--lora-rank",
    "--load-in-4bit": "--quantize 4bit", "--max-seq-length": "--max-length",
    "--gradient-accumulation-steps": "--micro-batch-tokens", "--optim": "--optimizer",
    "--warmup-ratio": "--warmup-steps", "--lr-scheduler-type": "--lr-schedule",
    "--alpha": "--retain-coefficient", "--trainer": "--method", "--methd": "--method",
    "--training.lr": "--lr", "--trainer.args.learning_rate": "--lr", "--report-to": "--track",
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT)
def test_an_unknown_option_is_answered_with_the_one_that_is_meant(name, capsys):
    assert main(["unlearn", name, "1"]) == 2
    error = capsys.readouterr().err
    assert error == f"npo-fast: error: unknown option {name}; did you mean {MEANT[name]}?\n"


def test_each_of_several_unknown_options_gets_its_answer(capsys):
    assert main(["unlearn", "--learning-rate=1", "--zzz", "--epoch", "3", "--lr", "1e-5"]) == 2
    error = capsys.readouterr().err
    assert "--learning-rate (did you mean --lr?), --zzz, --epoch (did you mean --epochs?)" in error


def test_an_option_of_another_verb_is_named_with_its_verb(capsys):
    assert main(["unlearn", "--card", "24"]) == 2
    assert "--card is an option of npo-fast plan" in capsys.readouterr().err
    assert main(["unlearn", "--tasks", "mmlu"]) == 2
    assert "--lm-eval is an option of npo-fast evaluate" in capsys.readouterr().err
    assert main(["report", "--epochs", "2"]) == 2
    assert "--epochs is an option of npo-fast unlearn, finetune" in capsys.readouterr().err
    assert main(["unlearn", "--resume"]) == 2
    assert "the same command goes on" in capsys.readouterr().err


def test_a_settings_file_gets_the_same_answers(tmp_path, capsys):
    file = tmp_path / "s.yaml"
    file.write_text("learning_rate: 1e-5\nbf16: true\nepoch: 2\n")
    assert main(["unlearn", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert "learning_rate (did you mean lr?), bf16 (did you mean dtype: bf16?), epoch (" in error
    assert len(error) < 300


def test_a_keyword_from_python_gets_the_same_answers():
    for name, place in (("learning_rate", r"TrainSettings\(lr=\.\.\.\)"),
                        ("lora_r", r"ModelOptions\(lora_rank=\.\.\.\)"),
                        ("retrain", "evaluation=EvaluationOptions")):  # fmt: skip
        with pytest.raises(UserError, match=place):
            unlearn("m", forget="f", **{name: 1})
    with pytest.raises(UserError, match="did you mean forget?"):
        unlearn("m", forget_set="f")
    assert TrainSettings(lr=1.0).lr == 1


# ---- values ----

VALUES = {
    "choice in capitals": (["--beta", "Auto"], "--beta must be a number or 'auto', got 'Auto'; "
                           "did you mean 'auto'?"),
    "no number": (["--lr", "fast"], "--lr must be a number, got 'fast'"),
    "half a number": (["--epochs", "2.5"], "--epochs must be a whole number, got '2.5'"),
    "no value": (["--lr"], "--lr needs a value: NUMBER"),
    "an option as a value": (["--lr", "--epochs", "3"], "--lr needs a value: NUMBER"),
    "a switch with a value": (["--overwrite=yes"], "--overwrite takes no value, got 'yes'"),
    "a stray word": (["--forget", "a.jsonl", "b.jsonl"], "'b.jsonl' belongs to no option: a value "
                     "follows the option that it is for"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_a_wrong_value_is_answered_in_one_line(case, capsys):
    arguments, message = VALUES[case]
    assert main(["unlearn", *arguments]) == 2
    assert capsys.readouterr().err == f"npo-fast: error: {message}\n"


def test_what_is_missing_is_named(capsys):
    assert main(["bench"]) == 2
    assert capsys.readouterr().err.startswith("npo-fast: error: npo-fast bench needs loss|kernels:")
    assert main(["plan"]) == 2
    assert "npo-fast plan needs --model NAME: Hub name" in capsys.readouterr().err
    assert main(["completion", "bsh"]) == 2
    error = capsys.readouterr().err
    assert "must be 'bash' or 'zsh' or 'fish', got 'bsh'; did you mean 'bash'?" in error


def test_a_launch_variable_that_is_no_number_is_named(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["unlearn", "--model", "m"]) == 2
    assert "WORLD_SIZE is 'two', not a number" in capsys.readouterr().err


# ---- completion ----


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_has_every_verb(shell):
    script = completion(shell)
    assert all(verb in script for verb in SUBCOMMANDS)
    assert "retain-coefficient" in script


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_verbs_options_and_choices(tmp_path):
    file = tmp_path / "npo-fast.bash"
    done = subprocess.run(
        [sys.executable, "-m", "npo_fast", "completion", "bash"], capture_output=True, text=True,
        cwd=Path(npo_fast.__file__).parents[1],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    file.write_text(done.stdout)

    def complete(line: str) -> set[str]:
        words = " ".join(shlex.quote(word) for word in line.split(" "))
        program = f"""
            source {shlex.quote(str(file))}
            COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            COMP_LINE={shlex.quote(line)}; COMP_POINT=${{#COMP_LINE}}
            function_of() {{ set -- $(complete -p npo-fast); while [ "$1" != -F ]; do shift; done
                             echo "$2"; }}
            $(function_of) npo-fast
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        out = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        return {word.strip() for word in out.stdout.splitlines() if word.strip()}

    assert complete("npo-fast un") == {"unlearn"}
    assert {"--retain", "--report-records", "--retain-coefficient"} <= complete(
        "npo-fast unlearn --re"
    )
    assert complete("npo-fast unlearn --dtype b") == {"bf16"}
