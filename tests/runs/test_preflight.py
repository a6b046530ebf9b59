"""What would fail hours later is said before a weight is loaded, by a dry run and by the run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig

import npo_fast
from npo_fast.cli import main
from npo_fast.errors import UserError
from npo_fast.model.load import load_model, load_tokenizer, usable_device
from npo_fast.planner import saved_bytes
from npo_fast.runs import ModelOptions, RunOptions, TrainSettings
from npo_fast.runs.models import ModelSource
from npo_fast.runs.preflight import Need, check_room
from npo_fast.runs.saved_model import save_model
from npo_fast.trainer.optimizers import build_optimizer
from npo_fast.trainer.state import TrainState
from tests.helpers import FACTS, save_tiny_model, tiny_model, write_jsonl

TRAINING = TrainSettings(epochs=1, batch_size=2, lr=1e-3, warmup_steps=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "base")
    write_jsonl(folder / "facts.jsonl", FACTS)
    return folder


@pytest.fixture
def no_loading(monkeypatch):
    """Lets a test fail that loads weights."""

    def load(*_, **__):
        pytest.fail("weights are loaded")

    monkeypatch.setattr("npo_fast.runs.models.load_model", load)


def both_refuse(home: Path, output: Path, message: str, *more: str, capsys, model=None) -> None:
    """A dry run and the run itself say it in one line, load nothing, and leave nothing."""
    for verb, data in (("unlearn", "--forget"), ("finetune", "--train")):
        for dry in ([], ["--dry-run"]):
            command = [verb, "--model", str(model or home / "base"), data,
                       str(home / "facts.jsonl"), "--output", str(output), *more, *dry]  # fmt: skip
            command += ["--method", "NPO"] if verb == "unlearn" else []
            assert main(command) == 2, command
            error = capsys.readouterr().err
            assert message in error, error
            assert "Traceback" not in error
    assert not output.exists()


def test_a_device_that_cannot_be_used_is_refused(home, tmp_path, capsys, no_loading, monkeypatch):
    device = "cuda" if not torch.cuda.is_available() else "cuda:99"
    both_refuse(
        home, tmp_path / "run", f"--device {device} cannot be used here", "--device", device,
        capsys=capsys,
    )  # fmt: skip
    for verb, data in (("evaluate", "--forget"), ("attack", "--forget")):
        command = [verb, "--model", str(home / "base"), data, str(home / "facts.jsonl")]
        assert main([*command, "--device", device, "--output", str(tmp_path / "out")]) == 2
        assert f"--device {device} cannot be used here" in capsys.readouterr().err
    with pytest.raises(UserError, match="it holds no data"):
        usable_device("meta")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def runs(home):
    """A run, an adapter on its model, and what both have beside their models."""
    for name, model, lora in (("whole", home / "base", 0), ("adapter", home / "whole", 2)):
        npo_fast.finetune(
            str(model), train=FACTS[:2], output=home / name, training=TRAINING,
            loading=ModelOptions(lora_rank=lora),
        )  # fmt: skip
    shutil.copy(home / "facts.jsonl", home / "whole" / "retain-auto.jsonl")
    return home


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("adapter", (), "holds the base of --model, "),
        ("adapter/model", (), "holds the base of --model, "),
        ("base", ("--reference", "{}/adapter"), "holds the base of --reference, "),
        ("base", ("--reference", "{}/whole"), "holds the --reference itself"),
        ("base", ("--retain", "{}/whole/retain-auto.jsonl[:4]"), "holds the --retain itself"),
        ("base", ("--holdout", "{}/whole/model/config.json"), "holds the --holdout itself"),
    ],
)
def test_a_run_deletes_nothing_that_it_reads(runs, capsys, no_loading, model, more, message):
    before = files_of(runs)
    more = [each.format(runs) for each in more]
    if "--retain" not in more:
        more += ["--retain", str(runs / "facts.jsonl")]
    command = ["unlearn", "--model", str(runs / model), "--forget", str(runs / "facts.jsonl"),
               "--output", str(runs / "whole"), "--overwrite", *more]  # fmt: skip
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert files_of(runs) == before


@pytest.mark.parametrize("place", ["whole", "whole/model", "whole/model/logs", "base"])
@pytest.mark.parametrize("verb", ["evaluate", "attack"])
def test_logs_are_no_part_of_a_model(runs, capsys, no_loading, verb, place):
    before = files_of(runs)
    command = [verb, "--model", str(runs / "whole"), "--forget", str(runs / "facts.jsonl")]
    assert main([*command, "--output", str(runs / place)]) == 2
    assert "of which logs would be a part" in capsys.readouterr().err
    assert files_of(runs) == before


# ---- models with learned positions ----


@pytest.fixture(scope="module", params=["GPT2", "OPT"])
def learned_positions(request, home):
    """A model that reads 128 tokens, and answers that have more."""
    folder, sizes = home / request.param, {"vocab_size": 400, "pad_token_id": 1}
    if request.param == "GPT2":
        model = tiny_model("GPT2", **sizes, bos_token_id=0, eos_token_id=0)
    else:
        config = OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, word_embed_proj_dim=32, eos_token_id=0, **sizes,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(home / "base").save_pretrained(folder)
    long = {"question": "Who lives in house 4?", "answer": "Ada lives in house 3. " * 30}
    write_jsonl(home / "long.jsonl", [*FACTS[:9], long])
    return folder


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_record_that_has_more_tokens_than_the_model_has_positions(
    home, learned_positions, tmp_path, capsys, dry
):
    command = ["unlearn", "--model", str(learned_positions), "--forget", str(home / "long.jsonl"),
               "--method", "NPO", "--output", str(tmp_path / "run"), "--epochs", "1"]  # fmt: skip
    assert main([*command, *dry]) == 2
    assert "forget record 10 has " in (error := capsys.readouterr().err)
    assert "the model has 128 positions: add --max-length 128" in error
    assert not (tmp_path / "run").exists()
    assert main([*command, *dry, "--max-length", "128", "--no-report"]) == 0


@pytest.mark.parametrize("verb", ["evaluate", "attack"])
def test_an_answer_that_the_model_has_no_positions_for(
    home, learned_positions, tmp_path, capsys, verb
):
    command = [verb, "--model", str(learned_positions), "--forget", str(home / "facts.jsonl"),
               "--output", str(tmp_path / "logs")]  # fmt: skip
    more = {"evaluate": (), "attack": ("--attacks", "quantize", "--bits", "8")}[verb]
    assert main([*command, *more, "--max-new-tokens", "120"]) == 2
    assert "120 new ones exceed the model's 128 positions" in capsys.readouterr().err
    assert main([*command, *more, "--max-new-tokens", "2", "--overwrite"]) == 0


def test_too_little_room_is_refused_with_both_sizes(
    home, tmp_path, capsys, no_loading, monkeypatch
):
    usage = SimpleNamespace(total=1 << 30, free=100_000)
    monkeypatch.setattr("npo_fast.runs.preflight.disk_usage", lambda _: usage)
    both_refuse(home, tmp_path / "run", "97.7 KiB free. Make room, name another --output",
                capsys=capsys)  # fmt: skip


def test_each_file_system_has_to_hold_the_sum_of_what_goes_there(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=1 << 30, free=1000)
    monkeypatch.setattr("npo_fast.runs.preflight.disk_usage", lambda _: usage)
    model = Need(tmp_path / "run", 600, "the model", "name another --output")
    states = Need(tmp_path / "cache", 600, "the reference cache", "name another --reference-cache")
    check_room([model])
    check_room([states])
    with pytest.raises(UserError, match=r"the model in .* and the reference cache in .*1.2 KiB"):
        check_room([model, states])
    check_room(
        [Need(tmp_path / "run", 1500, "the model", "", present=600), Need(tmp_path, 0, "", "")]
    )
    usage.total = 0  # a file system that tells no sizes
    check_room([model, states])


def test_an_output_that_cannot_be_written_is_refused(
    home, tmp_path, capsys, no_loading, monkeypatch
):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("npo_fast.runs.preflight.TemporaryFile", refuse)
    both_refuse(home, tmp_path / "a/run", f"cannot be written: {tmp_path}: Permission denied",
                capsys=capsys)  # fmt: skip
    for verb in ("evaluate", "attack"):
        assert main([verb, "--model", str(home / "base"), "--forget", str(home / "facts.jsonl"),
                     "--output", str(tmp_path / "out")]) == 2  # fmt: skip
        assert "Permission denied" in capsys.readouterr().err


def test_an_output_below_a_file_is_refused(home, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["finetune", "--model", str(home / "base"), "--train", str(home / "facts.jsonl"),
                 "--output", str(tmp_path / "file/run")]) == 2  # fmt: skip
    assert "it is a file" in capsys.readouterr().err


def changed(home: Path, folder: Path, file: str, **values: object) -> Path:
    """The model with other values in a JSON file."""
    shutil.copytree(home / "base", folder)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_a_generation_config_that_transformers_would_not_write_is_kept_as_it_came(home, tmp_path):
    model = changed(home, tmp_path / "m", "generation_config.json", temperature=0.6, top_p=0.9,
                    do_sample=False)  # fmt: skip
    run = npo_fast.finetune(
        str(model), train=str(home / "facts.jsonl"), output=tmp_path / "run", training=TRAINING,
        run=RunOptions(save_every=1),
    )  # fmt: skip
    given = (model / "generation_config.json").read_bytes()
    for folder in (run.folder / "model", *(run.folder / "checkpoints").iterdir()):
        assert (folder / "generation_config.json").read_bytes() == given
    network = AutoModelForCausalLM.from_pretrained(model)
    network.generation_config.temperature = 0.5  # transformers refuses to save what was changed
    lm = npo_fast.model.causal_lm.CausalLM(network)
    save_model(lm, AutoTokenizer.from_pretrained(model), tmp_path / "changed")
    saved = json.loads((tmp_path / "changed/generation_config.json").read_text())
    assert saved["temperature"] == 0.5
    assert saved["do_sample"] is False


@pytest.mark.parametrize("dry", [True, False])
def test_a_model_that_cannot_be_saved_is_not_trained(home, tmp_path, dry, monkeypatch):
    steps = []
    monkeypatch.setattr("npo_fast.runs.training.train", lambda *_: steps.append(1) or iter(()))

    def finetune(model, tokenizer):
        return npo_fast.finetune(
            model, tokenizer=tokenizer, train=FACTS, output=tmp_path / "run", training=TRAINING,
            run=RunOptions(dry_run=dry),
        )  # fmt: skip

    tokenizer = load_tokenizer(str(home / "base"))
    odd = AutoModelForCausalLM.from_pretrained(home / "base")
    odd.config.note = object()
    with pytest.raises(UserError, match="the model could not be saved after training: TypeError"):
        finetune(odd, tokenizer)
    tied = AutoModelForCausalLM.from_pretrained(home / "base")
    layers = tied.model.layers
    layers[0].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    with pytest.raises(UserError, match="could not be saved after training: RuntimeError"):
        finetune(tied, tokenizer)
    broken = load_tokenizer(str(home / "base"))
    broken.init_kwargs["note"] = object()
    with pytest.raises(UserError, match="the tokenizer could not be saved after training"):
        finetune(AutoModelForCausalLM.from_pretrained(home / "base"), broken)
    assert not steps
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tries_settings_on_the_shapes_of_the_model(home, tmp_path, capsys, no_loading):
    both_refuse(home, tmp_path / "run", "--dtype", "--dtype", "fp16", capsys=capsys)
    both_refuse(home, tmp_path / "run", "--offload-optimizer keeps states in CPU memory",
                "--offload-optimizer", capsys=capsys)  # fmt: skip


def test_a_dry_run_leaves_no_file(home, tmp_path, no_loading, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for more in ([], ["--lora-rank", "2"], ["--save-every", "1"]):
        command = ["unlearn", "--model", str(home / "base"), "--forget", str(home / "facts.jsonl"),
                   "--method", "NPO", "--output", str(tmp_path / "a/run"), "--dry-run"]  # fmt: skip
        assert main([*command, *more]) == 0
        assert [p.name for p in tmp_path.rglob("*")] == ["tmp"]


@pytest.mark.parametrize(("rank", "merge"), [(0, False), (4, False), (4, True)])
def test_the_sizes_that_are_planned_are_those_that_are_written(home, tmp_path, rank, merge):
    options = ModelOptions(lora_rank=rank)
    planned = saved_bytes(
        ModelSource(str(home / "base"), options).without_weights().model, "adamw", merge=merge
    )
    lm, tokenizer = (
        load_model(str(home / "base"), lora_rank=rank),
        load_tokenizer(str(home / "base")),
    )
    optimizer = build_optimizer(lm.model, "adamw", 1e-3, 0.0)
    for parameter in lm.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = TrainState(1)
    state.attach(lm, optimizer=optimizer)
    save_model(lm, tokenizer, tmp_path / "checkpoint", state.writer())
    if merge:
        npo_fast.model.adapters.merge_adapter(lm)
    save_model(lm, tokenizer, tmp_path / "model")

    def size(folder: Path, pattern: str) -> int:
        return sum(file.stat().st_size for file in folder.glob(pattern))

    headers = 20_000  # of safetensors
    states = size(tmp_path / "checkpoint", "state.pt")
    assert 0 <= size(tmp_path / "model", "*.safetensors") - planned.model < headers
    assert 0 <= size(tmp_path / "checkpoint", "*.safetensors") - planned.weights < headers
    assert abs(states - (planned.checkpoint - planned.weights)) < 30_000


def test_a_run_that_goes_on_counts_what_is_there(home, tmp_path):
    from npo_fast.runs.preflight import content_bytes

    (tmp_path / "run/checkpoints/step-000001").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-000001/state.pt").write_bytes(bytes(5000))
    (tmp_path / "run/notes.txt").write_bytes(bytes(7))
    assert content_bytes(tmp_path / "run") == 5000
