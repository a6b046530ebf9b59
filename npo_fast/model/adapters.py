"""LoRA and QLoRA through peft: a few new weights beside frozen ones, 4 bits wide if asked for.

A folder with an adapter is one that peft and transformers know (``adapter_config.json``,
``adapter_model.safetensors``); ``quantization_config.json`` beside them says how the base was
quantised while it trained.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging

from npo_fast.boundary import read_json
from npo_fast.errors import UserError, first_line
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.save import GENERATION, save_generation_config
from npo_fast.model.shard_files import SHARDS, load_in_place
from npo_fast.model.sharding import load_shards, read_shards
from npo_fast.model.weights import check_tensors, load_complete

Quantize = Literal["none", "4bit"]
WEIGHTS = "weights"  # begins the names of a model's own among the tensors of a checkpoint
ADAPTER_CONFIG, QUANTIZATION = "adapter_config.json", "quantization_config.json"


def check_libraries(quantize: Quantize, lora_rank: int) -> None:
    """Raises ``UserError`` for a missing library of LoRA or quantisation, or a negative rank."""
    if lora_rank < 0:
        raise UserError(f"lora_rank must be 0 (off) or more, got {lora_rank}")
    wanted = {"peft": "LoRA"} if lora_rank else {}
    if quantize == "4bit":
        wanted |= dict.fromkeys(("bitsandbytes", "accelerate"), "--quantize 4bit")
    for library, use in wanted.items():
        if find_spec(library) is None:
            raise UserError(f"{use} needs {library}: pip install {library}")


def nf4_config(dtype: torch.dtype) -> Any:
    """QLoRA's 4 bits (arXiv 2305.14314): NF4 in blocks of 64, with quantised scales."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_4bit_layout(model: Any) -> Any:
    """Keeps the 4-bit layers in the layout that their backward reads.

    On a CPU with AVX-512 bf16, bitsandbytes would repack a layer at its first forward without a
    gradient, for the forward alone, and refuses sizes that are not multiples of 32.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def add_lora(model: Any, base: str, rank: int, alpha: int | None = None) -> Any:
    """``W x + (alpha / rank) B A x`` in every linear layer but the LM head; only A, B train.

    A is drawn from a fixed seed and B is 0, so that the model is the same to the bit until the
    first step: reference log-probs of before training need no copy of it. Both are fp32. The
    adapter names ``base`` as its base model. ``alpha`` is twice the rank where it is not given.

    Source: LoRA (arXiv 2106.09685) equation 3.
    """
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)  # a 4-bit model's norms and head would train otherwise
    alpha = 2 * rank if alpha is None else alpha
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        torch.manual_seed(0)
        adapted = get_peft_model(model, config)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    return adapted.eval()


def adapter_base(folder: Path) -> str:
    """The model that the adapter in this folder belongs to; ``UserError`` where it names none."""
    config = read_json(folder / ADAPTER_CONFIG, dict[str, Any])
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(f"{folder / ADAPTER_CONFIG} names no base_model_name_or_path")
    return base


def load_adapter(model: Any, folder: Path) -> Any:
    """The base model with the adapter merged into it; beside 4-bit weights it stays apart."""
    if find_spec("peft") is None:
        raise UserError(f"{folder} holds a LoRA adapter, which needs peft: pip install peft")
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error, below
            adapted = PeftModel.from_pretrained(model, folder)
    except Exception as error:
        raise _misfit(folder, error) from error
    check_adapter(adapted)
    _read_adapter(adapted, folder)
    if getattr(model, "is_quantized", False):
        return adapted
    return adapted.merge_and_unload().requires_grad_(True)  # peft froze the base


def check_adapter(adapted: Any) -> None:
    """Raises ``UserError`` for an adapter that is more than a change of weights."""
    kind = adapted.active_peft_config
    if kind.is_prompt_learning or not hasattr(adapted.base_model, "merge_and_unload"):
        raise UserError(
            f"the adapter is {kind.peft_type.value}, which cannot be merged into weights: train "
            "its base model, or a LoRA adapter"
        )


def merge_adapter(lm: CausalLM) -> None:
    """Makes ``W + (alpha / rank) B A`` the weight, in place: a plain Hugging Face model."""
    lm.model = lm.model.merge_and_unload()


def write_weights(
    lm: CausalLM,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the model, or its adapter alone.

    Args:
        weights: the gathered ones of a shard; none where each process writes its rows.
        dtype: of the files, where it is not that of the model.
    """
    sizes = {} if lm.max_shard_bytes is None else {"max_shard_size": lm.max_shard_bytes}
    with lm.generating() as model:  # so that config.json names the model's own attention
        if dtype is not None:
            weights = converted(model.state_dict() if weights is None else weights, lm.dtype, dtype)
        with nullcontext() if lm.adapted else _plain_generation_config(model):
            model.save_pretrained(folder, safe_serialization=True, state_dict=weights, **sizes)
        if weights is not None and not weights:
            (folder / "model.safetensors").unlink(missing_ok=True)  # it is empty
        if (folder / GENERATION).exists():
            save_generation_config(model, folder)
        if dtype is not None:
            file = folder / "config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            config["dtype"] = str(dtype).removeprefix("torch.")
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if lm.adapted:
            if lm.quantized:
                quantization = model.config.quantization_config.to_json_string()
                (folder / QUANTIZATION).write_text(quantization, encoding="utf-8")
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty form


@contextmanager
def _plain_generation_config(model: Any) -> Iterator[None]:
    """Inside, the model generates by default: of another config transformers may refuse to save."""
    config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config


def converted(
    weights: dict[str, Tensor], dtype: torch.dtype, new: torch.dtype
) -> dict[str, Tensor]:
    """The weights of one dtype in a new one; tied weights stay one tensor."""
    by_pointer: dict[tuple[int, torch.Size], Tensor] = {}
    result = {}
    for name, weight in weights.items():
        if weight.dtype == dtype:
            key = (weight.data_ptr(), weight.shape)
            weight = by_pointer.setdefault(key, weight.to(new))
        result[name] = weight
    return result


def read_weights(lm: CausalLM, folder: Path) -> None:
    """Reads what ``write_weights``, or each process for itself, wrote into the model, in place."""
    if (folder / SHARDS).is_dir() and not lm.adapted:
        load_in_place(
            {f"{WEIGHTS}/{n}": p for n, p in lm.model.named_parameters()}, folder / SHARDS
        )
    elif lm.vocabulary_slice is not None:
        _read_shards(lm, folder)
    elif lm.adapted:
        _read_adapter(lm.model, folder)
    else:
        with no_progress_bars():
            saved = load_complete(
                type(lm.model), str(folder),
                pretrained_model_name_or_path=folder, dtype=lm.dtype,
            )  # fmt: skip
        lm.model.load_state_dict(saved.state_dict())


def _read_shards(lm: CausalLM, folder: Path) -> None:
    """``read_weights`` of a sharded model: each process reads its rows alone."""
    weights: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = safe_open(file, framework="pt")
        names = tensors.keys()
        weights |= {name: tensors.get_slice(name) for name in names}
    if lm.adapted:  # peft leaves the adapter's name out
        name = lm.model.active_adapter
        known = {n.replace(f".{name}.", "."): n for n, _ in lm.model.named_parameters()}
        weights = {known.get(key, key): rows for key, rows in weights.items()}
        missing = read_shards(lm.model, weights)
        unread = {*weights} - {*known.values()}
        check_tensors(
            str(folder), "the adapter", [n for n in missing if name in n.split(".")], unread
        )
        return
    if missing := read_shards(lm.model, weights):  # files whose names or shapes are converted
        saved = load_shards(
            type(lm.model), str(folder), lm.head.weight.device_mesh, lm.device,
            pretrained_model_name_or_path=folder, dtype=lm.dtype,
        )  # fmt: skip
        whole = dict(saved.named_parameters(remove_duplicate=False))
        for name, parameter in lm.model.named_parameters():
            parameter.detach().to_local().copy_(whole[name].detach().to_local())


def _read_adapter(adapted: Any, folder: Path) -> None:
    """The weights of an adapter, in place; ``UserError`` where one is missing or has no place."""
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(folder), device=str(next(adapted.parameters()).device))
    try:
        result: Any = set_peft_model_state_dict(adapted, weights)
    except (KeyError, RuntimeError) as error:
        raise _misfit(folder, error) from error
    prefix, name = adapted.base_model.prefix, adapted.active_adapter
    missing = [key for key in result.missing_keys if prefix in key and f".{name}" in key]
    check_tensors(str(folder), "the adapter", missing, result.unexpected_keys)


def _misfit(folder: Path, error: Exception) -> UserError:
    lines = [line.strip() for line in str(error).splitlines()]
    reason = next((line for line in lines if "size mismatch" in line), first_line(error))
    return UserError(f"the adapter in {folder} does not fit its base: {reason}")


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Inside, transformers shows no bars for the shards that it reads or writes."""
    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()
