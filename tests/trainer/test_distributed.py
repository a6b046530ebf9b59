"""Several processes train the same model as one does: losses, gradients, checkpoints, and ends."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from npo_fast import distributed
from npo_fast.attacks.quantize import quantized
from npo_fast.cli import main
from npo_fast.data import TokenizedExample, micro_batches
from npo_fast.distributed import full, local_of, rows_of
from npo_fast.kernels import layout
from npo_fast.losses import DPO, NLL, NPO
from npo_fast.methods import build_method
from npo_fast.model import shard_files
from npo_fast.model.adapters import WEIGHTS, add_lora, read_weights
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.shard_files import SHARDS, save_as_hugging_face, save_in_background
from npo_fast.model.sharding import gather_state_dict, load_shards, shard
from npo_fast.ops import linear_sequence_loss, vocab_parallel
from npo_fast.ops.linear_log_probs import resolve_chunk_rows
from npo_fast.ops.vocab_parallel import (
    SlicedHead,
    VocabularySlice,
    gather_rows,
    vocab_parallel_embedding,
)
from npo_fast.trainer.loop import reference_cache_for, reference_log_probs, train
from npo_fast.trainer.optimizers import build_optimizer, build_scheduler
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.state import TrainState
from tests.helpers import (
    FACTS,
    metadata_of,
    read_jsonl,
    results_of,
    save_tiny_model,
    sources,
    tiny_model,
    write_jsonl,
)

PROCESSES = [2, 4]
TOLERANCE = 1e-5
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.trainer.test_distributed", "torch.distributed.fsdp"])


def _process(work, rank: int, count: int, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    try:
        store = f"file://{folder / 'meeting'}"
        mesh = distributed.init_process_group(
            torch.device("cpu"), init_method=store, rank=rank, world_size=count
        )
        torch.save(work(mesh, *arguments), folder / f"{rank}.pt")
        distributed.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)


def on_ranks(count: int, folder: Path, work, *arguments) -> list:
    """What ``work(mesh, *arguments)`` returns on each of ``count`` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        SERVER.Process(target=_process, args=(work, rank, count, folder, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return results_of(processes, folder, 120)


# --- the operator ---------------------------------------------------------------------------------

HEAD = {"softcap": 3.0, "logit_scale": 0.7}
WIDTH, VOCABULARY = 24, 53  # a multiple of neither 2 nor 4


def _problem(dtype: torch.dtype, times: int = 1):
    """Rows of four parts, a head, and a label for each row."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    counts = [times * n for n in (7, 3, 0, 9)]
    hidden = [normal(n, WIDTH).to(dtype) for n in counts]
    weight, bias = (2 * normal(VOCABULARY, WIDTH)).to(dtype), normal(VOCABULARY).to(dtype)
    labels = torch.randint(VOCABULARY, (sum(counts),), generator=generator)
    return counts, hidden, weight, bias, labels


def _rows_of(counts: list[int], count: int) -> list[int]:
    per = len(counts) // count
    return [sum(counts[r * per : (r + 1) * per]) for r in range(count)]


def _loss_of_slices(
    mesh, dtype: torch.dtype, loss, chunk_rows: int | None, skip_below: float, times: int = 1
):
    _, hidden, weight, bias, labels = _problem(dtype, times)
    counts = _rows_of([len(h) for h in hidden], mesh.size())
    own = torch.cat(hidden).split(counts)[mesh.get_rank()].requires_grad_()
    vocabulary = VocabularySlice(mesh.get_group(), VOCABULARY)
    rows = slice(vocabulary.first, vocabulary.first + vocabulary.rows)
    weight, bias = weight[rows].clone().requires_grad_(), bias[rows].clone().requires_grad_()
    value, log_probs = linear_sequence_loss(
        gather_rows(own, counts, mesh.get_group()), weight, labels, times * CU_SEQLENS, loss,
        bias=bias, ref_log_probs=REFERENCE.to(dtype) if loss.reference else None,
        chunk_rows=chunk_rows, skip_below=skip_below, vocabulary=vocabulary, **HEAD,
    )  # fmt: skip
    (2 * value).backward()
    return value.detach(), log_probs, own.grad, weight.grad, bias.grad


CU_SEQLENS = torch.tensor([0, 4, 7, 10, 19])
REFERENCE = torch.tensor([-20.0, -11.0, -9.0, -41.0], dtype=torch.float64)


SLICED = {
    "NPO in one chunk": (NPO(0.1), None, 0.0),
    "DPO in chunks": (DPO(0.1), 7, 0.0),
    "NLL in less than a sequence, skipping": (NLL(), 3, 0.2),
}


def _assert_loss_of_the_whole(found: list, dtype, loss, chunk_rows, skip_below, times=1) -> None:
    """What ranks have found, against one process."""
    _, hidden, weight, bias, labels = _problem(dtype, times)
    one = torch.cat(hidden).requires_grad_()
    weight.requires_grad_()
    bias.requires_grad_()
    value, log_probs = linear_sequence_loss(
        one, weight, labels, times * CU_SEQLENS, loss, bias=bias, skip_below=skip_below,
        ref_log_probs=REFERENCE.to(dtype) if loss.reference else None, chunk_rows=chunk_rows,
        **HEAD,
    )  # fmt: skip
    (2 * value).backward()
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    for own in found:
        torch.testing.assert_close(own[0], value.detach(), **close)
        torch.testing.assert_close(own[1], log_probs, **close)
    for i, gradient in enumerate((one.grad, weight.grad, bias.grad), start=2):
        torch.testing.assert_close(torch.cat([own[i] for own in found]), gradient, **close)


@pytest.mark.slow
@pytest.mark.parametrize("count", PROCESSES)
@pytest.mark.parametrize(("loss", "chunk_rows", "skip_below"), SLICED.values(), ids=SLICED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_slices_of_the_vocabulary_give_the_loss_of_the_whole(
    tmp_path, count, loss, chunk_rows, skip_below, dtype
):
    found = on_ranks(count, tmp_path, _loss_of_slices, dtype, loss, chunk_rows, skip_below)
    _assert_loss_of_the_whole(found, dtype, loss, chunk_rows, skip_below)


def _as_on_gpus(mesh, cases: list) -> list:
    """Padded rows, bf16 logits and unrounded label logits, of labels that the slice may lack."""
    layout.runs_on_cpu = lambda tensor: False
    vocab_parallel.PIECE_ROWS = 64
    return [_loss_of_slices(mesh, *case) for case in cases]


@pytest.mark.slow
def test_slices_give_the_loss_of_the_whole_in_what_gpus_are_given(tmp_path):
    dtypes = (torch.float64, torch.bfloat16)
    cases = [(dtype, *case) for dtype in dtypes for case in SLICED.values()]
    in_pieces = (NPO(0.1), None, 0.0), (NLL(), 100, 0.2)
    cases += [(dtype, *case, 10) for dtype in dtypes for case in in_pieces]
    found = on_ranks(2, tmp_path, _as_on_gpus, cases)
    for case, *of_ranks in zip(cases, *found, strict=True):
        _assert_loss_of_the_whole(of_ranks, *case)


@pytest.mark.parametrize("vocabulary", [32001, 50257, 128256, 151936])
@pytest.mark.parametrize("count", [2, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_cut_the_same_chunks(vocabulary, count, dtype):
    class Slice(VocabularySlice):
        world_size, rank = count, 0

    class LastSlice(VocabularySlice):
        world_size, rank = count, count - 1

    slices = Slice(None, vocabulary), LastSlice(None, vocabulary)
    for trained, rows, memory_bytes in (
        (True, 900, None), (True, 1800, None), (True, 50_000, None), (True, 50_000, 1 << 20),
        (False, 50_000, None),
    ):  # fmt: skip
        chunks = set()
        for own in slices:
            weight = torch.empty(own.rows, 1024, dtype=dtype, device="meta")
            head = SlicedHead(weight.requires_grad_(trained), vocabulary=own)
            chunks.add(resolve_chunk_rows("op", head, rows, None, memory_bytes))
        assert len(chunks) == 1
        assert chunks.pop() >= 256, "of logits: whoever makes none knows of no slices"


def _sure(mesh):
    """fp32 rows that all but point at the labels' rows of the head."""
    _, _, weight, _, labels = _problem(torch.float32)
    hidden = (SURE * weight[labels]).requires_grad_()
    vocabulary = VocabularySlice(mesh.get_group(), VOCABULARY)
    own = weight[vocabulary.first :][: vocabulary.rows].clone().requires_grad_()
    value, log_probs = linear_sequence_loss(
        hidden, own, labels, CU_SEQLENS, NLL(), vocabulary=vocabulary
    )
    value.backward()
    return log_probs, own.grad


SURE = 0.2


@pytest.mark.slow
def test_slices_keep_their_digits_where_the_model_is_sure(tmp_path):
    _, _, weight, _, labels = _problem(torch.float32)
    weight = weight.double().requires_grad_()
    hidden = SURE * weight.detach()[labels]
    value, log_probs = linear_sequence_loss(hidden, weight, labels, CU_SEQLENS, NLL())
    value.backward()
    assert -1e-3 < float(log_probs.max()) < -1e-9, "sure, and not certain"
    found = on_ranks(2, tmp_path, _sure)
    gradient = torch.cat([own[1] for own in found]).double()
    error = (gradient - weight.grad).norm() / weight.grad.norm()
    assert error < 1e-5
    torch.testing.assert_close(found[0][0].double(), log_probs, rtol=1e-4, atol=0)


def _embed(mesh):
    vocabulary = VocabularySlice(mesh.get_group(), VOCABULARY)
    weight = _problem(torch.float64)[2]
    own = weight[vocabulary.first :][: vocabulary.rows].clone().requires_grad_()
    ids = IDS[mesh.get_rank()]
    out = vocab_parallel_embedding(ids, own, vocabulary, padding_id=5)
    (out * torch.arange(1.0, WIDTH + 1)).sum().backward()
    return out.detach(), own.grad


IDS = [torch.tensor([0, 52, 5, 0]), torch.tensor([20]), torch.tensor([5, 27, 28]), torch.arange(9)]


@pytest.mark.slow
@pytest.mark.parametrize("count", PROCESSES)
def test_a_sliced_embedding_reads_and_learns_as_a_whole_one(tmp_path, count):
    found = on_ranks(count, tmp_path, _embed)
    weight = _problem(torch.float64)[2].requires_grad_()
    ids = torch.cat(IDS[:count])
    out = torch.nn.functional.embedding(ids, weight, padding_idx=5)
    (out * torch.arange(1.0, WIDTH + 1)).sum().backward()
    torch.testing.assert_close(torch.cat([own[0] for own in found]), out.detach())
    torch.testing.assert_close(torch.cat([own[1] for own in found]), weight.grad)


# --- the loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("group", [1, 2])
def test_every_sequence_goes_to_one_process_and_all_make_as_many_passes(count, group):
    lengths = [5, 9, 3, 30, 4, 6, 8, 2, 12, 7]
    data = [TokenizedExample(tuple(range(n)), 1, i) for i, n in enumerate(lengths)]
    of_ranks = [micro_batches(data, 25, group, count, rank) for rank in range(count)]
    seen = [index for batch in of_ranks[0] for index in batch.indices]
    assert sorted(seen) == list(range(10))
    for batches in zip(*of_ranks, strict=True):
        labels = [batch.input_ids[batch.rows + 1] for batch in batches]
        for batch in batches:
            assert batch.lengths  # a pass through the model, if only to take part
            assert torch.equal(batch.labels, torch.cat(labels)), "all know all answers"
            assert batch.indices == batches[0].indices
            assert list(batch.rows_by_rank or [len(batch.rows)]) == [len(own) for own in labels]
            pairs = batch.indices[::group]
            assert [i for p in pairs for i in range(p, p + group)] == list(batch.indices)


def lm_of(family: str, lora: bool) -> CausalLM:
    torch.manual_seed(0)
    changes = {
        "Qwen2": {"tie_word_embeddings": True},
        "GPT2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }
    model = tiny_model(family, **changes.get(family, {}))
    if lora:
        model = add_lora(model, "base", rank=4, alpha=8)
        with torch.no_grad():  # B is 0 at first, and A would have no gradient
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return CausalLM(model)


def _steps(lm: CausalLM, method: str, checkpointing: bool, rho: float):
    """Records of four steps, the gradients of a first one, and the weights after the last."""
    terms = build_method(method)
    data = sources()
    settings = TrainSettings(
        epochs=2, batch_size=4, micro_batch_tokens=60, lr=1e-3, warmup_steps=1, seed=3,
        gradient_checkpointing=checkpointing, sharpness_rho=rho,
    )  # fmt: skip
    references = reference_log_probs(lm, data, terms, 60)
    states = reference_cache_for(terms, lm, data, 60)
    with torch.no_grad():  # a step from the reference itself has no KL
        for parameter in lm.model.parameters():
            parameter.mul_(1.05)
    gradients: dict = {}

    def keep(optimizer, *_):
        if not gradients:
            gradients.update(gather_state_dict({n: p.grad for n, p in lm.model.named_parameters()}))

    handle = register_optimizer_step_pre_hook(keep)
    try:
        records = [
            (r.loss, r.terms, r.log_probs, r.grad_norm)
            for r in train(lm, data, terms, settings, references, states)
        ]
    finally:
        handle.remove()
    return records, gradients, gather_state_dict(lm.model.state_dict(keep_vars=True)), references


def _train_on_ranks(mesh, family: str, lora: bool, *arguments):
    lm = CausalLM(shard(lm_of(family, lora).model, mesh))
    held = sum(p.to_local().numel() for p in lm.model.parameters())
    return *_steps(lm, *arguments), held


def _train_with_offload(mesh, family: str, lora: bool, *arguments):
    """With FSDP2's offload policy, whose gradients and states lie in CPU memory."""
    lm = CausalLM(shard(lm_of(family, lora).model, mesh, offload=True))
    return *_steps(lm, *arguments), sum(p.to_local().numel() for p in lm.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_offloaded_shards_train_as_one_process(tmp_path, lora):
    case = ("Llama", lora, "NPO+RT", False, 0.05)
    _assert_as_one(tmp_path, 2, *case, work=_train_with_offload)


@pytest.mark.slow
@pytest.mark.parametrize("count", PROCESSES)
@pytest.mark.parametrize(
    ("family", "lora", "method", "checkpointing", "rho"),
    [
        ("Llama", False, "NPO+RT", False, 0.0),
        ("Qwen2", False, "DPO+RT", True, 0.0),  # tied, with biases
        ("Phi", False, "KTO+RT", False, 0.05),
        ("Phi", False, "CEU+RT", False, 0.0),
        ("Llama", True, "NPO+RT", True, 0.05),
        ("Phi", False, "NPO+KL", False, 0.0),
        ("Qwen2", False, "UNDIAL+RT", False, 0.0),
        ("Llama", False, "RMU", False, 0.0),
        ("Llama", True, "RMU", True, 0.0),
    ],
    ids=[
        "full",
        "tied and checkpointed",
        "a head with bias, sharpness-aware",
        "cross-entropy",
        "LoRA, checkpointed, sharpness-aware",
        "a KL, a head with bias",
        "demoted labels",
        "a decoder layer",
        "a decoder layer, LoRA, checkpointed",
    ],
)
def test_several_processes_train_as_one(tmp_path, count, family, lora, method, checkpointing, rho):
    _assert_as_one(tmp_path, count, family, lora, method, checkpointing, rho)


# one sequence at a time; experts; learned positions, tied; softcaps; another bias; scaled logits
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*run one at a time")
@pytest.mark.parametrize("family", ["FalconH1", "Mixtral", "GPT2", "Gemma2", "Bloom", "Cohere"])
def test_three_processes_train_other_families_as_one(tmp_path, family):
    _assert_as_one(tmp_path, 3, family, False, "NPO+KL", False, 0.0)


def _assert_as_one(
    tmp_path, count, family, lora, method, checkpointing, rho, work=_train_on_ranks
) -> None:
    lm = lm_of(family, lora)
    everything = sum(p.numel() for p in lm.model.parameters())
    records, gradients, weights, references = _steps(lm, method, checkpointing, rho)
    found = on_ranks(count, tmp_path, work, family, lora, method, checkpointing, rho)
    assert len(records) == 4
    close = {"rtol": TOLERANCE, "atol": TOLERANCE}
    for own in found:
        torch.testing.assert_close(own[0][:2], records[:2], **close)
        torch.testing.assert_close(own[0], records, rtol=1e-4, atol=TOLERANCE)  # after updates
        torch.testing.assert_close(own[3], references, **close)
        assert own[4] < 1.3 * everything / count
    lead = found[0]
    assert lead[1].keys() == gradients.keys()
    scale = max(g.abs().max() for g in gradients.values() if g is not None)
    for name, gradient in gradients.items():
        torch.testing.assert_close(lead[1][name], gradient, rtol=1e-5, atol=1e-5 * float(scale))
    assert lead[2].keys() == weights.keys()
    for name, weight in weights.items():
        gradient = gradients.get(name)
        sure = torch.ones_like(weight, dtype=torch.bool)
        if gradient is not None:  # Adam makes whole steps of gradients that are rounding errors
            sure = (gradient.abs() > 1e-3 * scale) | (gradient == 0)
        torch.testing.assert_close(lead[2][name][sure], weight[sure], rtol=1e-3, atol=1e-4)


def _log_probs_after_dividing(mesh):
    lm = lm_of("Doge", lora=False)
    assert lm.packs
    before = lm.attention
    lm = CausalLM(shard(lm.model, mesh))
    (batch,) = lm.micro_batches(sources()["forget"], 1000)
    with torch.no_grad():
        return before, lm.attention, lm.log_probs(batch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*it keeps")
def test_an_attention_that_the_probe_exchanged_stays_exchanged(tmp_path):
    lm = lm_of("Doge", lora=False)
    (batch,) = micro_batches(sources()["forget"], 1000)
    expected = lm.log_probs(batch).detach()
    ((before, after, found),) = on_ranks(1, tmp_path, _log_probs_after_dividing)
    assert before == after != "npo_fast_packed"
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _wide_lm(mesh, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A model of which every shard of a matrix has whole blocks of 256 values."""
    torch.manual_seed(0)
    model = tiny_model(
        "Llama", hidden_size=128, intermediate_size=256, vocab_size=320, head_dim=32,
        num_key_value_heads=4,
    ).to(dtype)  # fmt: skip
    return CausalLM(model if mesh is None else shard(model, mesh))


def _losses(mesh, optimizer: str, dtype: torch.dtype) -> list[float]:
    lm, terms, data = _wide_lm(mesh, dtype), build_method("NPO+RT"), sources()
    settings = TrainSettings(epochs=2, batch_size=4, lr=1e-3, optimizer=optimizer)
    references = reference_log_probs(lm, data, terms, 60)
    return [r.loss for r in train(lm, data, terms, settings, references)]


@pytest.mark.slow
@pytest.mark.parametrize("count", PROCESSES)
def test_states_of_8_bits_are_those_of_one_process(tmp_path, count):
    losses = _losses(None, "adamw-8bit", torch.float32)
    for found in on_ranks(count, tmp_path, _losses, "adamw-8bit", torch.float32):
        assert found == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
def test_bf16_weights_are_rounded_at_random(tmp_path):
    losses = _losses(None, "adamw-bf16", torch.bfloat16)
    first, second = on_ranks(2, tmp_path, _losses, "adamw-bf16", torch.bfloat16)
    assert first == second == pytest.approx(losses, rel=0.02)


def _held(lm: CausalLM, optimizer) -> dict[str, torch.Tensor]:
    """This process's rows of weights and states."""
    names = {p: n for n, p in lm.model.named_parameters()}
    rows = {name: local_of(p.detach()).clone() for p, name in names.items()}
    for p, states in optimizer.state.items():
        for name, value in states.items():
            local = local_of(value)
            rows[f"{names[p]} {name}"] = (
                local.dequantize() if hasattr(local, "codes") else local.clone().detach()
            )
    return rows


def _parts(lm: CausalLM, optimizer: str) -> dict:
    built = build_optimizer(lm.model, optimizer, 1e-3, 0.1)
    return {"optimizer": built, "scheduler": build_scheduler(built, "linear", 1, 9)}


def _save(mesh, optimizer: str, folder: Path):
    lm, state = _wide_lm(mesh), TrainState(3)
    parts = _parts(lm, optimizer)
    state.attach(lm, **parts)
    for seed in range(3):
        for parameter in lm.model.parameters():
            whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            first, rows = rows_of(len(parameter), lm.rank, lm.world_size)
            parameter.grad = torch.zeros_like(parameter)
            local_of(parameter.grad).copy_(whole[first : first + rows])
        parts["optimizer"].step()
        parts["scheduler"].step()
    held = _held(lm, parts["optimizer"])
    if mesh is None:
        state.writer()(folder)
        lm.model.save_pretrained(folder)
        return held
    weights = {f"{WEIGHTS}/{n}": p.detach() for n, p in lm.model.named_parameters()}
    writing = save_in_background({**weights, **state.tensors()}, folder / SHARDS)
    with torch.no_grad():  # training goes on
        for parameter in lm.model.parameters():
            parameter.zero_()
    writing.result()
    if lm.rank == 0:
        state.writer()(folder)
    return held


def _restore(mesh, optimizer: str, folder: Path):
    lm = _wide_lm(mesh)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.zero_()
    read_weights(lm, folder)
    state, parts = TrainState.load(folder), _parts(lm, optimizer)
    state.attach(lm, **parts)
    assert state.step == 3
    assert parts["scheduler"].last_epoch == 3
    return _held(lm, parts["optimizer"])


def _work_on(count: int, folder: Path, work, *arguments) -> dict[str, torch.Tensor]:
    """What all processes hold together."""
    of_ranks = [work(None, *arguments)] if count == 1 else on_ranks(count, folder, work, *arguments)
    return {
        name: value if value.dim() == 0 else torch.cat([rows[name] for rows in of_ranks])
        for name, value in of_ranks[0].items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "counts"),
    [("adamw", (1, 2, 4)), ("adamw", (2, 4, 1)), ("adamw-8bit", (2, 2, 4)), ("adamw-8bit", (1, 4))],
)
def test_any_number_of_processes_goes_on_from_a_checkpoint(tmp_path, optimizer, counts):
    first, *others = counts
    (tmp_path / "saved").mkdir()
    saved = _work_on(first, tmp_path / "save", _save, optimizer, tmp_path / "saved")
    for count in others:
        work = tmp_path / f"restore-{count}"
        found = _work_on(count, work, _restore, optimizer, tmp_path / "saved")
        assert found.keys() == saved.keys()
        for name, value in saved.items():
            exact = optimizer == "adamw" or count == first or " " not in name
            # signed codes have no -1: the largest of a block of 8-bit states may be rounded again
            close = {"rtol": 0.0, "atol": 0.0 if exact else 0.02 * float(value.abs().max())}
            torch.testing.assert_close(found[name], value, **close, msg=name)


# --- files of weights -----------------------------------------------------------------------------


def _save_files(mesh, folder: Path, most_bytes: int, full_on: int | None):
    """What is said of a disk that is full for one process as it puts its files together."""
    lm = _wide_lm(mesh)
    lm.max_shard_bytes = most_bytes
    if mesh.get_rank() == full_on:

        def consolidate(*_, **__) -> None:
            raise OSError(28, "No space left on device")

        shard_files._consolidate_safetensors_files = consolidate
    try:
        save_as_hugging_face(lm, folder)
    except OSError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("most_bytes", [300_000, 5 << 30])
def test_shards_become_files_that_transformers_writes_too(tmp_path, most_bytes):
    model = _wide_lm(None).model
    model.save_pretrained(tmp_path / "whole", max_shard_size=most_bytes)
    model.config.save_pretrained(tmp_path / "saved")
    arguments = tmp_path / "saved", most_bytes, None
    assert on_ranks(2, tmp_path / "ranks", _save_files, *arguments) == [None, None]
    folders = tmp_path / "whole", tmp_path / "saved"
    names = [{file.name for file in folder.glob("model*")} for folder in folders]
    assert names[0] == names[1]
    assert ("model.safetensors.index.json" in names[0]) == (most_bytes == 300_000)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(saved[name], value), name


def _save_families(mesh, folder: Path) -> None:
    for family in FROM_FILES:
        kind = type(AutoModelForCausalLM.from_pretrained(folder / family))
        arguments = {"pretrained_model_name_or_path": folder / family, "dtype": torch.float32}
        model = shard(load_shards(kind, family, mesh, torch.device("cpu"), **arguments), mesh)
        lm = CausalLM(model, probe=False)
        lm.max_shard_bytes = 40_000
        (folder / f"{family}-saved").mkdir(exist_ok=True)
        save_as_hugging_face(lm, folder / f"{family}-saved")


@pytest.mark.slow
def test_converted_weights_have_the_names_and_shapes_of_files(tmp_path):
    for family in FROM_FILES:
        more = {"num_local_experts": 2} if family == "Mixtral" else {}
        tiny_model(family, **more).save_pretrained(tmp_path / family)
    on_ranks(2, tmp_path / "ranks", _save_families, tmp_path)
    for family in FROM_FILES:
        files = sorted((tmp_path / f"{family}-saved").glob("*.safetensors"))
        assert len(files) > 1
        index = json.loads(files[0].with_name("model.safetensors.index.json").read_text())
        saved = {}
        for file in files:
            content = load_file(file)
            assert {name for name, at in index["weight_map"].items() if at == file.name} == {
                *content
            }
            saved |= content
        expected = load_file(tmp_path / family / "model.safetensors")
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_all_hear_of_a_disk_that_is_full_for_one_process(tmp_path):
    said = on_ranks(2, tmp_path / "ranks", _save_files, tmp_path / "saved", 300_000, 1)
    assert said[0] == said[1]
    assert "No space left on device (process 1)" in said[0]


# --- loading --------------------------------------------------------------------------------------


def _own_bytes() -> int:
    """Resident memory but for pages of files, which the system takes back when it needs them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def _load(mesh, folder: Path) -> float:
    """The peak of memory beyond that before, as a multiple of the share."""

    def load(name: str) -> list[torch.Tensor]:
        model = load_shards(
            LlamaForCausalLM, name, mesh, torch.device("cpu"),
            pretrained_model_name_or_path=folder / name, dtype=torch.float32,
        )  # fmt: skip
        shard(model, mesh)
        own = [local_of(p.detach()) for p in model.parameters()]
        for rows in own:
            rows.add_(0)  # as a step does: until then they are pages of the files
        return own

    load("small")  # with all that is imported
    before = most = _own_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, _own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    share = sum(rows.nbytes for rows in load("large"))
    done.set()
    watcher.join()
    return (max(most, _own_bytes()) - before) / share


@pytest.mark.slow
@pytest.mark.parametrize("count", PROCESSES)
def test_a_process_reads_no_more_than_its_share(tmp_path, count):
    for name, layers in (("small", 1), ("large", 12)):
        config = LlamaConfig(
            vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=layers
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / name, max_shard_size="50MB")
    found = on_ranks(count, tmp_path / "ranks", _load, tmp_path)
    assert max(found) < 1.2


FROM_FILES = {
    "HrmText": "files with joined projections, cut by rows",
    "Mixtral": "two experts, of which the third process has none",
    "GPTNeoX": "a head that has another name in files",
    "FalconH1": "buffers that are not in the files",
}


def _loaded(mesh, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for family in FROM_FILES:
        kind = type(AutoModelForCausalLM.from_pretrained(folder / family))
        arguments = {"pretrained_model_name_or_path": folder / family, "dtype": torch.float32}
        model = load_shards(kind, family, mesh, torch.device("cpu"), **arguments)
        assert {type(p.data) for p in model.parameters()} == {DTensor}
        found[family] = {n: full(t.detach()) for n, t in (
            *model.named_parameters(), *model.named_buffers()
        )}  # fmt: skip
    return found


@pytest.mark.slow
def test_rows_of_files_are_those_of_the_whole_model(tmp_path):
    for family in FROM_FILES:
        more = {"num_local_experts": 2} if family == "Mixtral" else {}
        tiny_model(family, **more).save_pretrained(tmp_path / family)
    found = on_ranks(3, tmp_path / "ranks", _loaded, tmp_path)
    for family, what in FROM_FILES.items():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        for name, tensor in (*whole.named_parameters(), *whole.named_buffers()):
            assert torch.equal(found[0][family][name], tensor), f"{what}: {name}"


# --- attacks --------------------------------------------------------------------------------------


def _rounded(mesh, families: dict) -> list:
    """Weights of models while they are rounded, and whether they came back."""
    found = []
    for family, more in families.items():
        torch.manual_seed(0)
        model = tiny_model(family, **more)
        lm = CausalLM(model if mesh is None else shard(model, mesh), probe=False)
        before = [full(p.detach()).clone() for p in lm.model.parameters()]
        with quantized(lm, 4, 7) as share:
            weights = [full(p.detach()).clone() for p in lm.model.parameters()]
        after = [full(p.detach()) for p in lm.model.parameters()]
        found.append((share, weights, all(map(torch.equal, before, after))))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_shards_are_rounded_as_the_whole_is(tmp_path, count):
    families = {"Llama": {}, "GPT2": {}, "Mixtral": {"num_local_experts": 2}}
    found = on_ranks(count, tmp_path, _rounded, families)
    for of_rank in found:
        for got, expected in zip(of_rank, _rounded(None, families), strict=True):
            assert got[0] == expected[0] > 0.5
            assert all(map(torch.equal, got[1], expected[1]))
            assert got[2]


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model without dropout, what to forget and what to keep."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "base")
    other = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3.0)
    other.save_pretrained(folder / "other")
    write_jsonl(folder / "forget.jsonl", FACTS[6:])
    write_jsonl(folder / "retain.jsonl", FACTS[:6])
    return folder


def arguments(home: Path, output: Path, *more: str) -> list[str]:
    return ["unlearn", "--model", str(home / "base"), "--forget", str(home / "forget.jsonl"),
            "--retain", str(home / "retain.jsonl"), "--output", str(output), "--epochs", "5",
            "--lr", "1e-4", "--batch-size", "2", "--save-every", "2", "--no-report",
            *more]  # fmt: skip


def torchrun(count: int, call: list[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", str(count), "-m", "npo_fast", *call]  # fmt: skip
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=Path(__file__).parents[2])


def on_several_and_one(count: int, call: list[str], folder: Path) -> tuple[Path, Path]:
    """The outputs of a call under ``torchrun``, and of the same call in this process."""
    several, alone, log = folder / "several", folder / "alone", folder / "log"
    assert main([*call, "--output", str(alone)]) == 0
    process = torchrun(count, [*call, "--output", str(several)], log)
    assert process.wait(timeout=300) == 0, log.read_text()
    return several, alone


def losses_of(output: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(output / "steps.jsonl")]


def children_of(process: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def assert_alike(found, expected, where: str = "") -> None:
    """Equal texts, and numbers to 1e-5."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_alike(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_alike(a, b, f"{where}/{i}")
    elif isinstance(expected, float):
        # the coefficient is an exponential of what was measured
        rel = 1e-4 if where.endswith("retain_coefficient") else 1e-5
        assert found == pytest.approx(expected, rel=rel, abs=1e-5), where
    else:
        assert found == expected, where


WHOLE_RUNS = {
    "evaluated, the best kept, with a KL": (
        2, ("--method", "NPO+KL", "--eval-every", "2", "--keep-best", "forget.probability"),
    ),
    "evaluated, its own answers kept": (4, ("--retain", "auto", "--eval-every", "3")),
    "RMU on an adapter, to a cache": (
        2, ("--method", "RMU", "--lora-rank", "2", "--reference-cache", "{output}/cache"),
    ),
    "stepped in the backward, whole": (
        2, ("--step-in-backward", "--micro-batch-tokens", "200"),
    ),
    "stepped in the backward, unclipped, an adapter merged": (
        4, ("--step-in-backward", "--max-grad-norm", "inf", "--lora-rank", "2", "--merge",
            "--gradient-checkpointing", "--keep-utility", "0.9", "--epochs", "2"),
    ),
    "a KL on records that a batch has twice": (
        2, ("--method", "NPO+KL", "--batch-size", "5", "--forget", "{home}/retain.jsonl",
            "--retain", "{home}/forget.jsonl", "--epochs", "3"),
    ),
    "4-bit weights": (2, ("--quantize", "4bit", "--lora-rank", "2")),
    "another reference, beta from a base model": (
        2, ("--reference", "{home}/base", "--base-model", "{home}/other", "--beta", "auto"),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("count", "more"), WHOLE_RUNS.values(), ids=WHOLE_RUNS)
def test_a_whole_run_of_several_processes_is_that_of_one(home, tmp_path, count, more):
    runs = {}
    for name in ("alone", "several"):
        places = {"output": tmp_path / name, "home": home}
        call = arguments(home, tmp_path / name / "run", *(each.format(**places) for each in more))
        call.remove("--no-report")
        call += ["--max-new-tokens", "8", "--lr", "2e-3"]
        if name == "alone":
            assert main(call) == 0
        else:
            log = tmp_path / "log"
            assert torchrun(count, call, log).wait(timeout=300) == 0, log.read_text()
        run = tmp_path / name / "run"
        metadata = metadata_of(run)
        runs[name] = {
            "steps": [
                {k: v for k, v in line.items() if k != "time_ms"}
                for line in read_jsonl(run / "steps.jsonl")
            ],
            "evaluations": read_jsonl(run / "evaluations.jsonl") if "--eval-every" in more else [],
            **{key: metadata.get(key) for key in ("before", "after", "best", "beta", "level")},
            "verdict": metadata["verdict"],
        }
        saved = AutoModelForCausalLM.from_pretrained(run / "model")  # an adapter's base too
        runs[name]["weights"] = {n: p.flatten()[:50].tolist() for n, p in saved.named_parameters()}
    assert_alike(runs["several"], runs["alone"])


@pytest.mark.slow
def test_several_processes_measure_what_one_does(home, tmp_path):
    wrong = [{**fact, "perturbed_answer": [f"{fact['answer']} Not.", "Ada."]} for fact in FACTS]
    write_jsonl(tmp_path / "forget.jsonl", wrong[6:])
    write_jsonl(tmp_path / "holdout.jsonl", wrong[3:6])
    call = ["evaluate", "--model", str(home / "base"), "--forget", str(tmp_path / "forget.jsonl"),
            "--holdout", str(tmp_path / "holdout.jsonl"), "--reference", str(home / "other"),
            "--gradient-norms", "--max-new-tokens", "6", "--micro-batch-tokens", "40",
            "--generation-batch", "2"]  # fmt: skip
    several, alone = on_several_and_one(2, call, tmp_path)
    logs = sorted(path.name for path in alone.glob("*.json"))
    assert logs == sorted(path.name for path in several.glob("*.json"))
    for name in {*logs} - {"logged_records.json"}:  # whose digests are salted
        found, expected = (json.loads((each / name).read_text()) for each in (several, alone))
        assert_alike(found, expected, name)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_measures_on_several_processes_what_it_does_on_one(home, tmp_path, monkeypatch):
    """Choices, perplexities and answers of facts, five at a time, an odd number on the last."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{**fact, "choices": [fact["answer"], "Ada.", "No."]} for fact in FACTS[:7]]
    write_jsonl(tmp_path / "data.jsonl", lines)
    tasks = {
        "chosen": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": 0,
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc"}, {"metric": "brier_score"}],
        },
        "said": {
            "output_type": "generate_until", "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["."], "max_gen_toks": 7},
        },
        "read": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{answer}}", "metric_list": [{"metric": "word_perplexity"}],
        },
    }  # fmt: skip
    for name, task in tasks.items():
        data = {"data_files": {"test": str(tmp_path / "data.jsonl")}}
        task |= {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    call = ["evaluate", "--model", str(home / "base"), "--lm-eval", str(tmp_path),
            "--generation-batch", "5"]  # fmt: skip
    several, alone = on_several_and_one(3, call, tmp_path)
    found, expected = (json.loads((each / "lm_eval.json").read_text()) for each in (several, alone))
    assert {*expected} == {"chosen", "said", "read"}
    assert_alike(found, expected)


@pytest.mark.slow
def test_several_processes_attack_as_one_does(home, tmp_path):
    call = ["attack", "--model", str(home / "base"), "--forget", str(home / "forget.jsonl"),
            "--retain", str(home / "retain.jsonl"), "--max-new-tokens", "6", "--group", "7",
            "--epochs", "2", "--lr", "1e-3"]  # fmt: skip
    several, alone = on_several_and_one(2, call, tmp_path)
    found, expected = (json.loads((each / "attack.json").read_text()) for each in (several, alone))
    assert list(expected["measures"]) == ["before", "relearn", "int8", "int4"]
    assert_alike(found["measures"], expected["measures"])


IN_MEMORY = """
import sys
import npo_fast
from transformers import AutoModelForCausalLM, AutoTokenizer
base, forget, retain, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
settings = {
    "tokenizer": AutoTokenizer.from_pretrained(base),
    "training": npo_fast.TrainSettings(epochs=2, lr=1e-4, batch_size=2, warmup_steps=0),
}
npo_fast.unlearn(model, forget=forget, retain=retain, output=output + "/one", **settings)
npo_fast.unlearn(model, forget=retain, retain=forget, output=output + "/two", **settings)
try:
    lora = npo_fast.ModelOptions(lora_rank=2)
    data = {"forget": retain, "retain": forget, "output": output + "/three"}
    npo_fast.unlearn(model, loading=lora, **data, **settings)
except npo_fast.UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_model_in_memory_is_divided(home, tmp_path):
    (tmp_path / "program.py").write_text(IN_MEMORY)
    files = [str(home / name) for name in ("base", "forget.jsonl", "retain.jsonl")]
    for name, command in (
        ("alone", [sys.executable]),
        ("several", [sys.executable, "-m", "torch.distributed.run", "--standalone",
                     "--nproc-per-node", "2"]),
    ):  # fmt: skip
        call = [*command, str(tmp_path / "program.py"), *files, str(tmp_path / name)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert ("takes no adapter: load it again" in done.stdout) == (name == "several")
    for run in ("one", "two"):
        found, expected = losses_of(tmp_path / "several" / run), losses_of(tmp_path / "alone" / run)
        assert found == pytest.approx(expected, rel=1e-5)
        assert len(found) == (4 if run == "one" else 6)


@pytest.mark.slow
def test_a_mistake_in_the_call_is_told_once(tmp_path):
    log = tmp_path / "log"
    assert torchrun(3, ["unlearn", "--modle", "x"], log).wait(timeout=240) == 1
    told = [line for line in log.read_text().splitlines() if "npo-fast: error" in line]
    assert len(told) == 1, told
    assert "did you mean --model" in told[0]


def test_variables_of_torchrun_without_it_are_a_mistake(monkeypatch, home, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(arguments(home, tmp_path / "run")) == 2
    assert "WORLD_SIZE is 2, and the other processes cannot be met: start all with torchrun" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_after_a_killed_process_another_number_of_them_goes_on(home, tmp_path):
    assert main(arguments(home, tmp_path / "alone", "--epochs", "40")) == 0

    output, log = tmp_path / "several", tmp_path / "several.log"
    call = arguments(home, output, "--epochs", "40")
    process = torchrun(2, call, log)
    deadline = time.monotonic() + 120
    while not (output / "checkpoints" / "step-000004").exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert "lost contact with another process" in log.read_text(), log.read_text()
    assert metadata_of(output)["processes"] == 2

    assert main(call) == 0
    (begun,) = metadata_of(output)["resumed"]
    assert 4 <= begun["step"] < 80
    assert losses_of(output) == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-3, abs=1e-4)
    assert metadata_of(output)["status"] == "finished"


@pytest.mark.slow
def test_a_signal_ends_all_processes_after_the_same_step_and_more_go_on(home, tmp_path):
    assert main(arguments(home, tmp_path / "alone")) == 0
    output, log = tmp_path / "several", tmp_path / "several.log"
    call = arguments(home, output, "--epochs", "400", "--lora-rank", "4")
    process = torchrun(2, call, log)
    deadline = time.monotonic() + 120
    while not (output / "steps.jsonl").exists() or len(read_jsonl(output / "steps.jsonl")) < 3:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    text = log.read_text()
    assert "interrupted after step" in text, text
    assert metadata_of(output)["status"] == "interrupted"
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) == len(read_jsonl(output / "steps.jsonl"))
    assert (checkpoint / "adapter_model.safetensors").exists()

    done = json.loads((checkpoint / "adapter_config.json").read_text())
    assert done["r"] == 4


def test_other_verbs_take_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 2
    assert "torchrun is for unlearn, finetune, evaluate, attack" in capsys.readouterr().err
