"""lm-evaluation-harness on a model of ours, with tasks of its own: no hub is asked."""

import json
from importlib.util import find_spec

import pytest
import torch

from npo_fast.cli import main
from npo_fast.model.load import load_model, load_tokenizer
from tests.helpers import save_tiny_model

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval"
)
CHOICES = ["Ada lives in house 3.", "Ben.", "Cleo lives in house 5."]
TASK = """
task: houses
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "base")
    rows = [{"question": f"Who lives in house {i}?", "choices": CHOICES, "label": i % 3}
            for i in range(8)]  # fmt: skip
    (folder / "houses.json").write_text(json.dumps(rows))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "houses.yaml").write_text(TASK.replace("DATA", str(folder / "houses.json")))
    return folder


def run(home, tasks: str, *more: str) -> int:
    return main(["evaluate", "--model", str(home / "base"), "--lm-eval", tasks, *more])


@needs_lm_eval
def test_a_task_of_ones_own_is_measured_as_by_the_models_own_logits(
    home, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "out"
    assert run(home, str(home / "tasks"), "--output", str(output), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    model = load_model(str(home / "base")).model.eval()
    tokenizer = load_tokenizer(str(home / "base"))
    right = 0
    for i in range(8):
        prompt = f"Question: Who lives in house {i}?\nAnswer:"
        scores = []
        for choice in CHOICES:
            ids, begun = (
                tokenizer(f"{prompt} {choice}")["input_ids"],
                tokenizer(prompt)["input_ids"],
            )
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[t - 1, ids[t]]) for t in range(len(begun), len(ids))))
        right += scores.index(max(scores)) == i % 3
    assert found["lm_eval"]["houses"]["acc"] == right / 8
    assert json.loads((output / "lm_eval.json").read_text()) == found["lm_eval"]
    assert found["metrics"] == {}, "neither --forget nor --retain was named"
    assert run(home, str(home / "tasks"), "--output", str(output)) == 2, "--overwrite is wanted"
    assert "add --overwrite" in capsys.readouterr().err
    assert run(home, str(home / "tasks" / "houses.yaml")) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("lm-evaluation-harness\ntask    metric  value")
    assert "verdict" not in shown


@needs_lm_eval
@pytest.mark.slow  # the index of the harness's own tasks is read
def test_an_unknown_task_gets_a_suggestion_before_the_model_is_loaded(home, capsys):
    assert run(home, f"hellaswig,{home / 'tasks'}") == 2
    shown = capsys.readouterr().err
    assert "has no task 'hellaswig'; did you mean 'hellaswag'?" in shown
    assert "loading" not in shown


@needs_lm_eval
@pytest.mark.parametrize(
    ("content", "message"),
    [(TASK.replace("DATA", "/no/such/file.json"), "--lm-eval"), ("a: 1", "no task is defined")],
)
def test_a_task_that_cannot_be_used_ends_in_one_line(home, tmp_path, capsys, content, message):
    (tmp_path / "task.yaml").write_text(content)
    assert run(home, str(tmp_path / "task.yaml")) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("npo-fast: error")]
    assert message in line


def test_a_missing_package_is_named_with_its_cure(home, capsys, monkeypatch):
    monkeypatch.setattr("npo_fast.evaluation.harness.find_spec", lambda name: None)
    assert run(home, "mmlu") == 2
    assert "--lm-eval needs lm_eval, which is not here: pip install 'npo-fast[lm-eval]'" in (
        capsys.readouterr().err
    )


def test_what_names_no_task_is_refused(home, capsys):
    assert run(home, ",") == 2
    assert "--lm-eval takes names of tasks with commas between" in capsys.readouterr().err
