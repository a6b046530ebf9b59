"""UnlearningTrainer under FSDP2 and DeepSpeed ZeRO-3: several processes train as one does."""

import math
import multiprocessing
import os
import shutil
import traceback
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from npo_fast.data import pack
from npo_fast.errors import UserError
from npo_fast.integrations.hf_sharded import GatheredCausalLM, check_wrapper, gathered, is_divided
from npo_fast.integrations.hf_trainer import UnlearningDataset, UnlearningTrainer
from npo_fast.model.causal_lm import CausalLM
from tests.helpers import (
    calm_model,
    evaluation_of,
    logged,
    results_of,
    sequences,
    trainer_arguments,
    uneven,
)

STEPS, BATCH = 4, 4  # three steps are an epoch
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,  # else small weights are never divided
        "stage3_max_live_parameters": 0,  # else they stay whole after their forward
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed (pip install deepspeed)"
)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.integrations.test_hf_trainer_sharded"])


# --- several processes ----------------------------------------------------------------------------


def _process(work, rank: int, count: int, folder: Path, more: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    try:
        # they meet in a file: a port that was free a moment ago can be taken
        torch.distributed.init_process_group(
            "gloo", f"file://{folder}/meeting", timedelta(minutes=2), world_size=count, rank=rank
        )
        torch.save(work(folder, *more), folder / f"{rank}.pt")
        torch.distributed.barrier()
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # taking wrappers and gloo down can hang


def on_ranks(count: int, folder: Path, work, *more) -> list:
    """What ``work(folder, *more)`` returns on each of ``count`` processes."""
    folder.mkdir(exist_ok=True)
    processes = [
        SERVER.Process(target=_process, args=(work, rank, count, folder, more))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return results_of(processes, folder, 240)


def model_of(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    families = {"tied": "Qwen2", "softcap": "Gemma2"}
    family = next((families[name] for name in families if name in kind), "Llama")
    model = calm_model(family, tie_word_embeddings=family != "Llama")
    if "LoRA" not in kind:
        return model
    head = {"modules_to_save": ["lm_head"]} if "head" in kind else {}
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **head
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():  # B is 0 at first, and A would have no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def wrapped_arguments(folder: Path, wrapper: str | None, **changes):
    """accelerate divides models on GPUs alone: here it takes processes with a CPU for such."""
    changes = {
        "max_steps": STEPS, "optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0,
        "per_device_train_batch_size": BATCH, **changes,
    }  # fmt: skip
    if wrapper is None:
        return trainer_arguments(folder, **changes)
    if wrapper == "one process":
        return trainer_arguments(folder, fsdp=True, **changes)
    config = {"version": 2, "state_dict_type": "FULL_STATE_DICT", **changes.pop("fsdp_config", {})}
    options = {"fsdp": True, "fsdp_config": config}
    if wrapper.startswith("zero"):
        stage = {"stage": int(wrapper[-1])}
        options = {"deepspeed": {**ZERO, "zero_optimization": ZERO["zero_optimization"] | stage}}
    args = trainer_arguments(folder, ddp_backend="gloo", **options, **changes)
    if wrapper.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self):
        self.first = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if not self.first:
            named = model.named_parameters()
            self.first = {name: whole(p.grad) for name, p in named if p.grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def weights_of(model) -> dict[str, torch.Tensor]:
    with gathered(list(model.parameters())):
        return {name: whole(p) for name, p in model.named_parameters()}


def trainer_of(folder: Path, wrapper: str | None, kind: str, method: str, **changes):
    data = UnlearningDataset(uneven(12, 1), uneven(13, 2), idk=uneven(12, 3))
    model = model_of(kind)  # before the arguments: DeepSpeed divides what is made after them
    args = wrapped_arguments(folder, wrapper, **changes)
    return UnlearningTrainer(model, args, data, method=method)


def _train(folder: Path, wrapper: str | None, kind: str, method: str, count: int, parts: int):
    """Logs, gradients and weights of a few steps on ``BATCH`` sequences, and how many a rank."""
    one = trainer_of(
        folder, wrapper, kind, method, gradient_accumulation_steps=parts,
        per_device_train_batch_size=BATCH // count // parts,
    )  # fmt: skip
    gradients = Gradients()
    one.add_callback(gradients)
    one.train()
    held = sum(getattr(p, "_local_tensor", p).numel() for p in one.model.parameters())
    return logged(one), gradients.first, weights_of(one.model), held


# --- one process ----------------------------------------------------------------------------------


class Gatherer(torch.nn.Module):
    """Gives the head its weight for its forward, and for the backward of what that returns."""

    def __init__(self, model):
        super().__init__()
        self.module, self.shapes = model, []
        self.head = model.get_output_embeddings()
        self.weight = self.head.weight.detach().clone()
        self.free()
        self.head.register_forward_pre_hook(self.gather)
        self.head.register_forward_hook(self.after)

    def gather(self, *_):
        self.head.weight.data.copy_(self.weight)

    def free(self):
        self.head.weight.data.fill_(torch.nan)

    def after(self, _head, _inputs, out):
        self.shapes.append(tuple(out.shape))
        self.free()
        out = out * 1.0  # a wrapper may return another tensor
        out.register_hook(self.gather)
        return out

    def forward(self, **inputs):
        return self.module(**inputs)


def test_the_head_is_read_inside_of_its_own_forward_alone():
    (batch,) = pack(sequences(4, 1), 1000)
    plain = CausalLM(model_of("full"))
    expected = plain.log_probs(batch)
    expected.sum().backward()
    lm = GatheredCausalLM(model_of("full"))
    torch.testing.assert_close(lm.log_probs(batch), expected)  # nothing divides it yet
    wrapper = Gatherer(lm.model)
    with lm.within(wrapper):
        log_probs = lm.log_probs(batch)
    log_probs.sum().backward()
    torch.testing.assert_close(log_probs, expected)
    assert wrapper.shapes == [(1, 1, len(expected))], "no logits"
    for own, other in zip(lm.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    assert "forward" not in vars(lm.head)


def test_the_value_of_a_loss_is_not_rounded_where_a_wrapper_rounds_what_modules_return():
    (batch,) = pack(sequences(4, 1), 1000)
    lm = GatheredCausalLM(model_of("full"))
    expected = CausalLM(model_of("full")).log_probs(batch)
    lm.head.register_forward_hook(lambda _head, _inputs, out: out.bfloat16())
    with lm.within(lm.model):
        torch.testing.assert_close(lm.log_probs(batch), expected)


def test_what_a_wrapper_cannot_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match="FSDP divides a model among processes.*torchrun"):
        trainer_of(tmp_path, "one process", "full", "NPO+RT")
    with (
        pytest.raises(UserError, match="takes one sequence at a time.*: use DDP"),
        pytest.warns(UserWarning, match="does not take attention from outside"),
    ):
        GatheredCausalLM(calm_model("Bloom"))


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"n_gpu": 2}, "start one process a GPU"),
        ({"is_distributed_loading_by_transformers": True}, "load it whole"),
        ({"is_fsdp_enabled": False}, "leave fsdp out"),  # as accelerate does on a CPU
        ({"is_quantized": True}, "4-bit weights .*: use DDP"),
        ({"even_batches": False}, "even_batches=True"),
        ({"fsdp_version": 1}, "--fsdp_version 2"),
        ({"cpu_ram_efficient_loading": True}, "--fsdp_cpu_ram_efficient_loading false"),
    ],
)
def test_a_refusal_names_the_cure(changes, cure):
    facts = {
        "n_gpu": 1, "is_distributed_loading_by_transformers": False, "is_fsdp_enabled": True,
        "is_deepspeed_enabled": False, "even_batches": True, "fsdp_version": 2,
        "cpu_ram_efficient_loading": False, "fsdp": True, "is_quantized": False,
    }  # fmt: skip

    def trainer(**changes):
        all_in_one = SimpleNamespace(**facts | changes)
        all_in_one.args = all_in_one.accelerator = all_in_one.accelerator_config = all_in_one
        all_in_one.state = all_in_one.fsdp_plugin = all_in_one.model = all_in_one
        return all_in_one

    check_wrapper(trainer())
    with pytest.raises(UserError, match=cure):
        check_wrapper(trainer(**changes))


# --- the same numbers -----------------------------------------------------------------------------

WRAPPERS = ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)]
CASES = [
    (2, "full", "NPO+RT", 1),
    (2, "tied", "DPO+RT", 1),
    (2, "full", "KTO+RT", 2),
    (2, "tied", "NPO+KL", 1),
    (2, "LoRA", "NPO+RT", 2),
    (4, "tied LoRA", "KTO+RT", 1),
    (2, "LoRA and head", "NPO+RT", 1),
    (4, "softcap", "NPO+RT", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(("count", "kind", "method", "parts"), CASES)
def test_processes_that_share_a_model_train_as_one(tmp_path, wrapper, count, kind, method, parts):
    logs, gradients, weights, _ = _train(tmp_path, None, kind, method, 1, 1)
    before = dict(model_of(kind).named_parameters())
    moved = max(float((w - before[n].detach()).abs().max()) for n, w in weights.items())
    found = on_ranks(count, tmp_path, _train, wrapper, kind, method, count, parts)
    assert len(logs) == STEPS
    everything = sum(w.numel() for w in weights.values())
    gaps = {"logs": 0.0, "gradients": 0.0, "weights": 0.0}
    for own_logs, own_gradients, own_weights, held in found:
        for log, expected in zip(own_logs, logs, strict=True):
            names = {name for name in expected if "NPO" in name or "log-prob" in name}
            for name in names | {"loss", *log} - {"epoch", "step", "learning_rate", "grad_norm"}:
                gap = abs(log[name] - expected[name]) / max(1.0, abs(expected[name]))
                gaps["logs"] = max(gaps["logs"], gap)
        assert held < 1.3 * everything / count
        assert own_weights.keys() == weights.keys()
        for name, weight in weights.items():
            gap = float((own_weights[name] - weight).abs().max()) / moved
            gaps["weights"] = max(gaps["weights"], gap)
        if wrapper == "fsdp2":  # ZeRO-3 has taken its step by then
            assert own_gradients.keys() == gradients.keys()
            scale = max(float(g.abs().max()) for g in gradients.values())
            for name, gradient in gradients.items():
                gap = float((own_gradients[name] - gradient).abs().max()) / scale
                gaps["gradients"] = max(gaps["gradients"], gap)
    print(gaps)
    assert all(gap < 1e-5 for gap in gaps.values()), gaps


def _evaluate(folder: Path, wrapper: str | None, count: int) -> list[dict[str, float]]:
    """The measures before, during and after training."""
    measured = evaluation_of(folder)
    records = [record for rows in measured.suite.values() for record in rows.records]
    examples, _ = measured.template.encode_all(records)
    args = wrapped_arguments(
        folder / "run", wrapper, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="retain.probability",
        greater_is_better=True, learning_rate=1e-3, per_device_train_batch_size=BATCH // count,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    assert is_divided(next(model.parameters())) == (wrapper == "zero3")
    data = UnlearningDataset(examples[:4], examples[4:])
    one = UnlearningTrainer(model, args, data, eval_dataset=measured)
    looks = [one.evaluate()]
    one.train()
    looks += [entry for entry in one.state.log_history if "eval_forget.probability" in entry]
    looks.append(one.evaluate())
    return [measures_of(look) for look in looks]


def measures_of(look: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in look.items() if name.startswith("eval_")}


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_each_process_measures_the_whole_model(tmp_path, wrapper):
    expected = _evaluate(tmp_path, None, 1)
    assert len(expected) == STEPS + 2
    best = max(expected[1:-1], key=lambda look: look["eval_retain.probability"])
    assert best != expected[-2], "else the last weights are the best ones"
    assert expected[-1] == pytest.approx(best, rel=1e-5)
    shutil.rmtree(tmp_path / "run")
    for looks in on_ranks(2, tmp_path, _evaluate, wrapper, 2):
        for look, one in zip(looks, expected, strict=True):
            assert look == pytest.approx(one, rel=1e-4, abs=1e-6)


def _save(folder: Path, wrapper: str, kind: str, state_dict_type: str, checkpoint: Path | None):
    """Weights and references of a run that saves all it can."""
    one = trainer_of(
        folder, wrapper, kind, "NPO+RT", save_strategy="steps", save_steps=1,
        optim="adamw_torch", learning_rate=1e-3, per_device_train_batch_size=2,
        fsdp_config={"state_dict_type": state_dict_type},
    )  # fmt: skip
    one.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    one.save_model(str(folder / "final"))
    return weights_of(one.model), one.references["forget"], len(logged(one))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapper", "kind", "state_dict_type"),
    [
        ("fsdp2", "tied", "FULL_STATE_DICT"),
        ("fsdp2", "full", "SHARDED_STATE_DICT"),
        ("fsdp2", "LoRA", "FULL_STATE_DICT"),
        pytest.param("zero3", "full", "", marks=needs_deepspeed),
        pytest.param("zero3", "LoRA", "", marks=needs_deepspeed),
    ],
)
def test_training_resumes_and_the_saved_model_is_a_plain_one(
    tmp_path, wrapper, kind, state_dict_type
):
    arguments = (_save, wrapper, kind, state_dict_type)
    (weights, references, _), _ = on_ranks(2, tmp_path / "first", *arguments, None)
    checkpoint = tmp_path / "first" / "checkpoint-1"
    for again in on_ranks(2, tmp_path / "again", *arguments, checkpoint):
        torch.testing.assert_close(again[1], references, rtol=0, atol=0)
        assert again[2] == STEPS
        for name, weight in weights.items():
            torch.testing.assert_close(again[0][name], weight, rtol=1e-6, atol=1e-7)
    final = tmp_path / "first" / "final"
    if state_dict_type == "SHARDED_STATE_DICT":  # transformers leaves them to checkpoints
        assert not final.exists()
        return
    if kind == "LoRA":
        saved = peft.PeftModel.from_pretrained(model_of("full"), final)
        names = {name for name in weights if "lora" in name}
    else:
        saved = transformers.AutoModelForCausalLM.from_pretrained(final)
        names = set(weights)
    parameters = dict(saved.named_parameters())
    assert names <= set(parameters)
    for name in names:
        torch.testing.assert_close(parameters[name].detach(), weights[name])


def _train_a_loaded_model(folder: Path, wrapper: str | None, count: int):
    args = wrapped_arguments(folder, wrapper, per_device_train_batch_size=BATCH // count)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    divided = all(map(is_divided, model.parameters()))
    data = UnlearningDataset(uneven(12, 1), uneven(13, 2))
    one = UnlearningTrainer(model, args, data)
    one.train()
    return divided, logged(one), weights_of(one.model)


@pytest.mark.slow
@needs_deepspeed
def test_a_model_that_deepspeed_divides_as_it_loads_trains_as_a_whole_one(tmp_path):
    model_of("full").save_pretrained(tmp_path / "base")
    divided, logs, weights = _train_a_loaded_model(tmp_path, None, 1)
    assert not divided
    for divided, own_logs, own_weights in on_ranks(2, tmp_path, _train_a_loaded_model, "zero3", 2):
        assert divided
        for log, expected in zip(own_logs, logs, strict=True):
            assert log["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(own_weights[name], weight, rtol=1e-5, atol=1e-6)


def _train_with(folder: Path, wrapper: str | None, count: int, method: str, changes: dict):
    one = trainer_of(
        folder, wrapper, "full", method, per_device_train_batch_size=BATCH // count, **changes
    )
    one.train()
    return logged(one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1},
        {"gradient_checkpointing": True},
        {"fsdp_config": {"activation_checkpointing": True}},
        {"fsdp_config": {"reshard_after_forward": False}},
    ],
    ids=lambda changes: str(next(iter(changes.get("fsdp_config", changes)))),
)
def test_settings_of_fsdp_change_no_loss(tmp_path, changes):
    plain = {name: value for name, value in changes.items() if name == "max_steps"}
    logs = _train_with(tmp_path, None, 1, "KTO+RT", plain)
    for own in on_ranks(2, tmp_path, _train_with, "fsdp2", 2, "KTO+RT", changes):
        assert [log["loss"] for log in own] == pytest.approx([log["loss"] for log in logs], 1e-5)


@pytest.mark.slow
@needs_deepspeed
def test_weights_that_deepspeed_leaves_whole_train_the_same(tmp_path):
    logs = _train_with(tmp_path, None, 1, "KTO+RT", {})
    for own in on_ranks(2, tmp_path, _train_with, "zero2", 2, "KTO+RT", {}):
        assert [log["loss"] for log in own] == pytest.approx([log["loss"] for log in logs], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("method", ["NPO+RT", "NPO+KL"])
def test_mixed_precision_starts_at_the_reference(tmp_path, wrapper, method):
    logs = _train_with(tmp_path, None, 1, method, {"bf16": True})
    for own in on_ranks(2, tmp_path, _train_with, wrapper, 2, method, {"bf16": True}):
        assert own[0]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-2)
        assert own[-1]["loss"] == pytest.approx(logs[-1]["loss"], rel=5e-2)
        if method == "NPO+RT" and wrapper == "zero3":  # log-ratios are 0 at first
            assert own[0]["NPO"] == pytest.approx(20 * math.log(2), rel=1e-6)
        # a loss that the wrapper had rounded to bf16 would have 8 bits
        assert own[0]["loss"] != float(torch.tensor(own[0]["loss"]).bfloat16())


def _train_to_the_end(folder: Path, wrapper: str) -> list[dict[str, float]]:
    """Seven sequences in device batches of one: the last step of an epoch has fewer."""
    model = model_of("full")
    args = wrapped_arguments(
        folder, wrapper, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    data = UnlearningDataset(uneven(7, 1), uneven(9, 2), idk=uneven(7, 3))
    one = UnlearningTrainer(model, args, data, method="KTO+RT")
    one.train()
    return logged(one)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_processes_with_other_lengths_and_a_short_last_step_reach_the_end(tmp_path, wrapper):
    first, second = on_ranks(2, tmp_path, _train_to_the_end, wrapper)
    assert len(first) == 4
    assert first == second
