"""What a run saves equals what it was given: dtype, shards, ties, tokenizer and settings."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import npo_fast
from npo_fast import locks
from npo_fast.model.load import load_tokenizer
from npo_fast.model.save import save_tokenizer
from npo_fast.runs.options import ModelOptions, ReportOptions
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import FACTS, save_tiny_model

QUIET = ReportOptions(no_report=True)
TRAINING = TrainSettings(epochs=1, lr=1e-2, batch_size=2, warmup_steps=0)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A tied model in bf16 shards, with a tokenizer that has no padding token."""
    plain = save_tiny_model(tmp_path_factory.mktemp("plain"))
    folder = tmp_path_factory.mktemp("given")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, tie_word_embeddings=True
    )
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder, max_shard_size="20KB")
    load_tokenizer(str(plain)).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))  # on one line, as nobody writes it
    return folder


def unlearn(model: Path, output: Path, **options) -> npo_fast.Run:
    return npo_fast.unlearn(
        str(model), forget=FACTS[:2], method="NPO", output=output, training=TRAINING, report=QUIET,
        loading=ModelOptions(device="cpu", **options),
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def test_a_run_saves_a_model_as_it_came(given: Path, tmp_path: Path) -> None:
    run = unlearn(given, tmp_path / "run")
    saved = tmp_path / "run/model"
    before, after = weights(given), weights(saved)
    assert {name: w.dtype for name, w in after.items()} == {n: w.dtype for n, w in before.items()}
    assert not all(torch.equal(after[name], before[name]) for name in before)
    assert len(list(saved.glob("*.safetensors"))) == len(list(given.glob("*.safetensors"))) > 1
    for file in given.iterdir():
        if not file.name.startswith("model"):
            assert (saved / file.name).read_bytes() == file.read_bytes(), file.name
    in_memory = dict(run.model.state_dict())
    assert all(torch.equal(in_memory[name], w.float()) for name, w in after.items())


def test_a_dtype_that_was_asked_for_is_saved(given: Path, tmp_path: Path) -> None:
    unlearn(given, tmp_path / "run", dtype="fp32")
    assert {w.dtype for w in weights(tmp_path / "run/model").values()} == {torch.float32}


def test_a_tokenizer_that_was_changed_is_saved_as_it_is(given: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(given))
    tokenizer.add_tokens(["<new>"])
    save_tokenizer(tokenizer, tmp_path)
    assert "<new>" in transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab()


def test_without_file_locks_a_run_says_so_and_goes_on(
    given: Path, tmp_path: Path, monkeypatch
) -> None:
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(locks.logger, "handlers", [handler])
    monkeypatch.setattr(locks, "CAN_LOCK", False)
    locks._say_unlocked.cache_clear()
    unlearn(given, tmp_path / "run")
    assert said == [locks.NO_LOCKS]


@pytest.mark.slow
def test_everything_imports_without_fcntl() -> None:
    modules = "npo_fast.integrations.hf_trainer, npo_fast.trainer.loop, npo_fast.cli.unlearn"
    code = f"import sys; sys.modules['fcntl'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
