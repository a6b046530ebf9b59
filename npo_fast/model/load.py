"""Models and tokenizers by hub name, folder or GGUF file."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import safe_open

from npo_fast.boundary import check_folder, read_json
from npo_fast.errors import UserError, first_line, reading, short
from npo_fast.model.adapters import (
    ADAPTER_CONFIG,
    QUANTIZATION,
    Quantize,
    adapter_base,
    add_lora,
    check_libraries,
    keep_4bit_layout,
    load_adapter,
    nf4_config,
    no_progress_bars,
)
from npo_fast.model.causal_lm import CausalLM

_MOST, _MOST_LAYERS = 2**31 - 1, 10_000  # of a size in config.json, of its layers
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "auto",
    quantize: Quantize = "none",
    lora_rank: int = 0,
    lora_alpha: int | None = None,
) -> CausalLM:
    """A causal language model, probed and ready to train.

    Args:
        name: hub name, folder of ``save_pretrained``, a ``.gguf`` file or a folder with one, or a
            folder with a LoRA adapter, which is merged into its base model unless that is 4 bits
            wide.
        dtype: "fp32", "bf16" or "fp16", to compute in and to save; "auto" computes in bf16 on a GPU
            that has it, else in fp32, and saves the dtype that the files have.
        device: a torch device; "auto" is the GPU where there is one.
        attention: a transformers attention implementation; "auto" is FlashAttention where it is
            installed and fits GPU and model, else PyTorch's own (``npo_fast_varlen``) where that
            fits, else scaled dot-product attention a sequence at a time (``npo_fast_packed``).
        quantize: "4bit" loads the linear layers as NF4 (bitsandbytes), for LoRA on top.
        lora_rank: above 0, a new adapter of this rank is all that trains.
        lora_alpha: its scale times the rank; twice the rank where it is not given.

    Raises:
        UserError: nothing there, not a causal language model, or a library is missing.
    """
    check_libraries(quantize, lora_rank)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch_device = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:0") from error
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    torch_dtype = DTYPES[default_dtype(torch_device) if dtype == "auto" else dtype]
    model = _load_weights(name, torch_dtype, torch_device, quantize)
    if lora_rank:
        if hasattr(model, "peft_config"):
            raise UserError(
                f"{name!r} is an adapter on 4-bit weights, and takes no second one: start from "
                "its base model"
            )
        model = add_lora(model, _folder(name), lora_rank, lora_alpha)
    lm = CausalLM(model, attention)
    if dtype == "auto" and not lm.quantized:
        lm.saved_dtype = _stored_dtype(name)
    lm.max_shard_bytes = _largest_shard(name)
    return lm


def _load_weights(name: str, dtype: torch.dtype, device: torch.device, quantize: Quantize) -> Any:
    folder = Path(_folder(name))
    if (folder / ADAPTER_CONFIG).is_file():
        is_4bit = quantize == "4bit" or (folder / QUANTIZATION).exists()
        base = _load_weights(adapter_base(folder), dtype, device, "4bit" if is_4bit else "none")
        return load_adapter(base, folder)
    arguments: dict[str, Any] = {"dtype": dtype, **_source(name)}
    is_gguf = "gguf_file" in arguments
    if quantize == "4bit":
        check_libraries(quantize, 0)
        if is_gguf:
            raise UserError("--quantize 4bit takes a model that is not quantised, not a GGUF file")
        arguments |= {"device_map": {"": device}, "quantization_config": nf4_config(dtype)}
        return keep_4bit_layout(_load(transformers.AutoModelForCausalLM, name, **arguments))
    model = _load(transformers.AutoModelForCausalLM, name, **arguments)
    return (_dequantised(model) if is_gguf else model).to(device)


def load_config(name: str) -> Any:
    """The configuration of a model: a name as ``load_model`` takes it, or a config.json alone."""
    is_file = name.endswith(".json")
    if is_file and not Path(name).is_file():
        raise UserError(f"no configuration file {name!r}")
    source = {"pretrained_model_name_or_path": name} if is_file else _source(name)
    return _load(transformers.AutoConfig, name, **source)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model by a name as ``load_model`` takes it."""
    folder = Path(_folder(name))
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "tokenizer_config.json").exists():
        return load_tokenizer(adapter_base(folder))
    tokenizer = _load(transformers.AutoTokenizer, name, **_source(name))
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name!r} has no end-of-sequence token: set eos_token")
    return tokenizer


def load_generation_config(name: str) -> Any:
    """The generation config of a model by a name as ``load_model`` takes it; None without one."""
    try:
        folder, source = Path(_folder(name)), _source(name)
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / "generation_config.json").exists():
            return load_generation_config(adapter_base(folder))
        if "gguf_file" in source:
            return None
        return transformers.GenerationConfig.from_pretrained(
            source["pretrained_model_name_or_path"]
        )
    except Exception:  # such as a folder with a tokenizer alone, or a damaged file
        return None


def default_dtype(device: torch.device) -> Literal["fp32", "bf16"]:
    """What dtype "auto" means on a device."""
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bf16" if half else "fp32"


def _folder(name: str) -> str:
    """The model of a run, or the name itself."""
    path = Path(name)
    if (path / "run.json").is_file() and (path / "model").is_dir():
        return str(path / "model")
    return name


def _stored_dtype(name: str) -> torch.dtype | None:
    """The dtype of the weights in the files of a model; None where they do not say."""
    folder = Path(_folder(name))
    if (folder / ADAPTER_CONFIG).is_file():
        return _stored_dtype(adapter_base(folder))
    source = _source(name)
    if "gguf_file" in source:  # of several widths
        return None
    dtype = load_config(name).get_text_config().dtype
    if dtype is None:
        for file in sorted(folder.glob("*.safetensors"))[:1]:
            with safe_open(file, framework="pt") as tensors:
                dtype = tensors.get_tensor(next(iter(tensors.keys()))).dtype
    return dtype


def _largest_shard(name: str) -> int | None:
    """Bytes of the largest file of weights, where a model comes in several."""
    folder = Path(_folder(name))
    shards = [file.stat().st_size for file in folder.glob("model-*-of-*.safetensors")]
    return max(shards, default=None)


def _source(name: str) -> dict[str, str]:
    """The arguments of ``from_pretrained``: a hub name or folder, and a GGUF file in it."""
    name = _folder(name)
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no GGUF file {name!r}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir() and not any((path / n).exists() for n in ("config.json", ADAPTER_CONFIG)):
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(
                f"{name!r} holds no config.json and {len(files)} GGUF files; "
                "name a model folder or one .gguf file"
            )
        return {"pretrained_model_name_or_path": name, "gguf_file": files[0].name}
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"no model folder {name!r}")
    return {"pretrained_model_name_or_path": name}


def _load(auto: Any, name: str, **arguments: Any) -> Any:
    path = Path(arguments["pretrained_model_name_or_path"])
    if path.is_dir():
        check_folder(path)
        _check_sizes(path / "config.json")
    kind = "tokenizer" if auto is transformers.AutoTokenizer else "causal language model"
    with reading(f"{name!r} as a {kind}"), no_progress_bars() if path.exists() else nullcontext():
        try:
            return auto.from_pretrained(**arguments)
        except ImportError as error:
            raise UserError(
                f"cannot load {name!r}: {first_line(error)}; install what it names, such as pip "
                "install gguf accelerate"
            ) from error


def _check_sizes(file: Path) -> None:
    """Raises ``UserError`` for a configuration that no model has: building it may never end."""
    if not file.is_file():
        return
    for name, value in dict(read_json(file, dict[str, Any])).items():
        most = _MOST_LAYERS if "layer" in name or "experts" in name else _MOST
        if isinstance(value, int) and value > most:
            raise UserError(f"{file} is damaged: {name} is {short(value)}, more than {most}")


def _dequantised(model: Any) -> Any:
    """The same weights in a model that is not marked as quantised.

    transformers dequantises GGUF tensors on loading, yet marks the model and refuses to save it.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain = type(model)(model.config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
