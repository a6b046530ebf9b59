"""The reference's hidden states and log-probs on disk: what comes back, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from npo_fast import linear_kl
from npo_fast.data import TokenizedExample, pack
from npo_fast.errors import UserError
from npo_fast.methods import build_method
from npo_fast.model import reference_states as module
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.reference_log_probs import check_cache, reference_log_probs_of
from npo_fast.model.reference_states import (
    TemporaryFolder,
    model_fingerprint,
    open_reference_states,
)
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs, train
from npo_fast.trainer.settings import TrainSettings
from tests.helpers import (
    FACTS,
    exit_code,
    read_jsonl,
    save_tiny_model,
    slow_but,
    sources,
    tiny_model,
    write_jsonl,
)
from tests.helpers import small_lm as trainable_lm

SOURCES = {
    "retain": [TokenizedExample(tuple(range(3, 3 + 4 + i % 5)), 1 + i % 3, i) for i in range(9)],
    "forget": [TokenizedExample((9, 8, 7, 6, 5, 4), 2, 0), TokenizedExample((4, 5, 6), 1, 1)],
}


def small_lm(family: str = "Llama") -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(tiny_model(family), probe=False)


@pytest.fixture(scope="module")
def lm():
    return small_lm()


@pytest.fixture(scope="module")
def made(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "reference"
    open_reference_states(lm, SOURCES, folder, "answer", 20)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


@pytest.mark.parametrize("positions", ["answer", "all"])
@pytest.mark.parametrize("family", slow_but(["Gemma2"], ["Llama", "Gemma2", "Phi"]))
@pytest.mark.parametrize("shard_bytes", [1 << 28, 2000, 1])
def test_what_was_written_comes_back(family, positions, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", shard_bytes)
    lm = small_lm(family)
    lm.model.train()
    cache = open_reference_states(lm, SOURCES, tmp_path / "ref", positions, 20)
    assert lm.model.training
    lm.model.eval()
    assert cache.made_from["positions"] == positions
    for source, sequences in SOURCES.items():
        for batch in pack(sequences[::-1], 30):
            states = lm.states(batch)
            expected = states if positions == "all" else lm.hidden(batch)
            found = cache.hidden(source, batch.indices)
            torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
            arguments = {name: lm.head_arguments[name] for name in ("softcap", "logit_scale")}
            kl = linear_kl(
                expected, lm.head.weight, found, bias=lm.head_arguments["bias"],
                **arguments, **cache.head_arguments,
            )  # fmt: skip
            assert float(kl) < 1e-6
    shards = len(list((tmp_path / "ref").glob("retain-*.safetensors")))
    assert shards == 1 if shard_bytes == 1 << 28 else shards > 1


def test_a_cache_outlives_the_model_that_made_it(made):
    again = small_lm()
    cache = open_reference_states(again, SOURCES, made, "answer", 20)
    before = cache.hidden("retain", [2, 0]), cache.head_arguments["ref_weight"].clone()
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.add_(1.0)
    assert torch.equal(cache.hidden("retain", [2, 0]), before[0])
    assert torch.equal(cache.head_arguments["ref_weight"], before[1])


def test_half_precision_stays_half_precision(tmp_path):
    lm = CausalLM(tiny_model("Llama").bfloat16(), probe=False)
    cache = open_reference_states(lm, SOURCES, tmp_path / "ref", "answer", 20)
    assert cache.hidden("forget", [0]).dtype == torch.bfloat16
    assert cache.head_arguments["ref_weight"].dtype == torch.bfloat16


def test_an_existing_cache_is_read_and_not_made_again(lm, made, monkeypatch):
    monkeypatch.setattr(lm, "states", lambda batch: pytest.fail("the model ran"))
    open_reference_states(lm, SOURCES, made, "answer", 20)


def test_another_model_data_or_choice_of_positions_is_refused(lm, made):
    changed = small_lm()
    with torch.no_grad():
        next(changed.model.parameters())[3, 0] += 1e-3
    with pytest.raises(UserError, match=r"reference was made with another model than.*delete the"):
        open_reference_states(changed, SOURCES, made, "answer", 20)
    fewer = {**SOURCES, "retain": SOURCES["retain"][1:]}
    with pytest.raises(UserError, match="another data"):
        open_reference_states(lm, fewer, made, "answer", 20)
    with pytest.raises(UserError, match="another data"):
        open_reference_states(lm, {"retain": SOURCES["retain"]}, made, "answer", 20)
    with pytest.raises(UserError, match="another positions"):
        open_reference_states(lm, SOURCES, made, "all", 20)


def test_a_config_that_changes_the_states_changes_the_fingerprint():
    lm = small_lm()
    before = model_fingerprint(lm.model)
    assert model_fingerprint(small_lm().model) == before
    lm.model.config.rms_norm_eps = 1e-3
    assert model_fingerprint(lm.model) != before


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def poison(path):
    save_file({k: torch.full_like(t, torch.nan) for k, t in load_file(path).items()}, path)


def reshape(path):
    save_file({k: t[:, :-1].contiguous() for k, t in load_file(path).items()}, path)


@pytest.mark.parametrize("name", ["retain-00000.safetensors", "head.safetensors"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, poison, reshape])
def test_a_damaged_file_is_refused_by_name(lm, copy, name, damage):
    damage(copy / name)
    with pytest.raises(UserError, match=rf"{name} is damaged .*delete the folder or name another"):
        open_reference_states(lm, SOURCES, copy, "answer", 20)


def test_a_missing_file_is_refused_by_name(lm, copy):
    (copy / "forget-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*forget-00000.safetensors"):
        open_reference_states(lm, SOURCES, copy, "answer", 20)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"format": 2}', '{"format": 1}'])
def test_a_folder_that_is_no_cache_is_refused_and_left_alone(lm, tmp_path, text):
    (tmp_path / "thesis.txt").write_text("precious")
    if text is not None:
        (tmp_path / "reference.json").write_text(text)
    with pytest.raises(
        UserError, match=r"reference\.json (is not there or not|is damaged|has the format 1)"
    ):
        open_reference_states(lm, SOURCES, tmp_path, "answer", 20)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_states_that_are_not_finite_are_not_kept(tmp_path):
    lm = small_lm()
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[9] = torch.nan  # in forget record 1
    with pytest.raises(UserError, match="forget records 1.*not finite"):
        open_reference_states(lm, {"forget": SOURCES["forget"]}, tmp_path / "ref", "answer", 6)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_no_cache(lm, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match=r"cannot save .*No space left"):
        open_reference_states(lm, SOURCES, tmp_path / "ref", "answer", 20)
    assert list(tmp_path.iterdir()) == []


def test_the_index_names_every_file(made):
    facts = json.loads((made / "reference.json").read_text())
    assert {*facts["files"], "reference.json"} == {path.name for path in made.iterdir()}


EDITS = {
    "softcap": lambda index: index.update(softcap=3.0),
    "logit_scale": lambda index: index.update(logit_scale=0.5),
    "places": lambda index: index["sources"]["retain"][0]["lengths"].reverse(),
    "files": lambda index: index["files"].pop("forget-00000.safetensors"),
    "its own SHA-256": lambda index: index.pop("sha256"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_index_is_refused(lm, copy, edit):
    file = copy / "reference.json"
    index = json.loads(file.read_text())
    EDITS[edit](index)
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"reference\.json is damaged .*; delete the folder"):
        open_reference_states(lm, SOURCES, copy, "answer", 20)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_bit_of_the_index_is_never_lost_in_silence(lm, made, copy, share):
    file = copy / "reference.json"
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 4
    file.write_bytes(content)
    try:
        cache = open_reference_states(lm, SOURCES, copy, "answer", 20)
    except UserError as error:
        assert str(file) in str(error)  # noqa: PT017
    else:  # a space of the layout
        expected = open_reference_states(lm, SOURCES, made, "answer", 20)
        assert cache.head.transform == expected.head.transform


ABANDON = """
import sys, time
from npo_fast.model.reference_states import TemporaryFolder
folder = TemporaryFolder()
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_the_folder_of_a_killed_process_goes_with_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", ABANDON], stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    killed, alive = (Path(process.stdout.readline().decode().strip()) for process in processes)
    processes[0].kill()
    processes[0].wait()
    folder = TemporaryFolder()
    assert not killed.exists()
    assert alive.exists()
    assert folder.path.parent == tmp_path
    processes[1].kill()
    processes[1].wait()


def test_two_runs_that_want_one_cache_make_it_once(lm, tmp_path, monkeypatch):
    made = []

    def slowly(*arguments):
        made.append(1)
        time.sleep(0.3)
        return save_folder(*arguments)

    save_folder = module.save_folder
    monkeypatch.setattr(module, "save_folder", slowly)

    def open_cache(_):
        return open_reference_states(lm, SOURCES, tmp_path / "cache", "answer", 100)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(open_cache, range(2))
    assert len(made) == 1
    assert one.made_from == other.made_from


# ---- log-probs ----


def losses(method: str, cache: Path | None) -> list[float]:
    """Of a run on all data, with the reference from ``cache``."""
    lm, terms = trainable_lm(), build_method(method)
    references = reference_log_probs(lm, sources(), terms, 40, cache)
    states = reference_cache_for(terms, lm, sources(), 40, cache)
    settings = TrainSettings(epochs=2, batch_size=4, lr=1e-3, micro_batch_tokens=40)
    return [step.loss for step in train(lm, sources(), terms, settings, references, states)]


@pytest.mark.parametrize("method", slow_but(["DPO+KL"], ["NPO+RT", "DPO+KL", "KTO", "TNPO+RT"]))
def test_a_run_with_kept_log_probs_is_the_run_without_to_the_bit(method, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    alone = losses(method, None)
    assert losses(method, cache) == alone
    monkeypatch.setattr(
        "npo_fast.model.reference_log_probs._compute", lambda *_: pytest.fail("computed again")
    )
    assert losses(method, cache) == alone


def test_methods_share_the_log_probs_of_the_same_answers(tmp_path, monkeypatch):
    from npo_fast.model import reference_log_probs as module

    computed = []

    def compute(lm, sequences, tokens):
        computed.append(len(sequences))
        return original(lm, sequences, tokens)

    original = module._compute
    monkeypatch.setattr(module, "_compute", compute)
    data, lm = sources(), trainable_lm()
    for method in ("NPO", "TNPO", "DPO", "KTO", "AltPO"):
        expected = reference_log_probs(lm, data, build_method(method), 40)
        del computed[:]
        found = reference_log_probs(lm, data, build_method(method), 40, tmp_path)
        assert computed == {"NPO": [7], "DPO": [7], "AltPO": [7]}.get(method, [])
        assert found.keys() == expected.keys()
        for source, value in found.items():
            assert all(torch.equal(a, b) for a, b in zip(value, expected[source], strict=True))
    kept = {"log_probs-forget", "log_probs-idk", "log_probs-alternate"}
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.fixture
def kept(tmp_path):
    """Log-probs of SOURCES under ``small_lm()``."""
    reference_log_probs_of(small_lm(), SOURCES, 20, tmp_path / "cache")
    return tmp_path / "cache"


def test_log_probs_of_another_model_head_data_or_dtype_are_refused(kept):
    def opened(lm, data=SOURCES):
        return reference_log_probs_of(lm, data, 20, kept)

    opened(small_lm())
    remedy = "; delete the folder or name another one"
    changed = small_lm()
    with torch.no_grad():
        next(changed.model.parameters())[3, 0] += 1e-3
    with pytest.raises(UserError, match=f"log_probs-retain was made with another model .*{remedy}"):
        opened(changed)
    with pytest.raises(UserError, match="another model"):
        opened(CausalLM(small_lm().model.bfloat16(), probe=False))
    capped = small_lm()
    capped.transform = capped.transform._replace(softcap=3.0)
    with pytest.raises(UserError, match="another head"):
        opened(capped)
    with pytest.raises(UserError, match="another autocast"), torch.autocast("cpu", torch.bfloat16):
        opened(small_lm())
    fewer = {**SOURCES, "retain": SOURCES["retain"][1:]}
    with pytest.raises(UserError, match="another data"):
        opened(small_lm(), fewer)
    longer = [
        TokenizedExample(e.input_ids, e.prompt_length + 1, e.index) for e in SOURCES["retain"]
    ]
    with pytest.raises(UserError, match="another data"):
        opened(small_lm(), {"retain": longer})


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_damaged_log_probs_are_refused_by_name(lm, kept, damage):
    damage(kept / "log_probs-forget" / "log_probs.safetensors")
    with pytest.raises(UserError, match=r"log_probs-forget/log_probs.safetensors is damaged"):
        reference_log_probs_of(lm, SOURCES, 20, kept)


def test_log_probs_that_are_not_finite_are_not_kept(tmp_path):
    lm = small_lm()
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[9] = torch.nan  # in forget record 1
    with pytest.raises(UserError, match="forget records 1: the log-probs of the reference are not"):
        reference_log_probs_of(lm, {"forget": SOURCES["forget"]}, 6, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_a_folder_that_is_no_reference_cache_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds no reference cache; name another reference_cache"):
        reference_log_probs_of(small_lm(), SOURCES, 20, tmp_path)
    with pytest.raises(UserError, match="thesis.txt is a file"):
        check_cache(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_cache_of_an_earlier_version_is_told(made):
    with pytest.raises(UserError, match="is of an earlier version; delete the folder"):
        check_cache(made)


@pytest.mark.slow
def test_the_command_line_shares_log_probs_between_runs(tmp_path, capsys):
    save_tiny_model(tmp_path / "model")
    write_jsonl(tmp_path / "forget.jsonl", FACTS[:4])
    write_jsonl(tmp_path / "retain.jsonl", FACTS[4:])
    cache = tmp_path / "reference"

    def unlearn(name, *more):
        return exit_code(
            ["unlearn", "--model", str(tmp_path / "model"), "--epochs", "2", "--no-report",
             "--forget", str(tmp_path / "forget.jsonl"), "--output", str(tmp_path / name),
             "--retain", str(tmp_path / "retain.jsonl"), "--lr", "1e-3", *more]
        )  # fmt: skip

    shared = ("--method", "NPO+KL", "--reference-cache", str(cache))
    assert unlearn("alone", *shared[:2]) == 0
    assert unlearn("first", *shared) == 0
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert unlearn("second", *shared) == 0
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == written
    runs = [
        [step["loss"] for step in read_jsonl(tmp_path / name / "steps.jsonl")]
        for name in ("alone", "first", "second")
    ]
    assert runs[0] == runs[1] == runs[2]
    assert unlearn("dpo", "--method", "DPO+RT", *shared[2:]) == 0
    assert (cache / "log_probs-idk").is_dir()
    capsys.readouterr()
    assert unlearn("other", "--model", str(tmp_path / "first"), *shared) == 2
    assert "log_probs-forget was made with another model than this run's" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert unlearn("none", "--method", "NPO", "--reference-cache", str(tmp_path / "mine")) == 2
    assert "holds no reference cache" in capsys.readouterr().err
