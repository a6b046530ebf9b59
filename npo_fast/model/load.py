"""Models and tokenizers by hub name, folder or GGUF file."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
import transformers
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh

from npo_fast.boundary import check_folder, read_json
from npo_fast.errors import UserError, first_line, reading, short
from npo_fast.model.adapters import (
    ADAPTER_CONFIG,
    QUANTIZATION,
    WEIGHTS,
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
from npo_fast.model.manifest import (
    MANIFEST,
    DamagedError,
    check_saved,
)
from npo_fast.model.model_files import largest_shard, model_folder, source_of
from npo_fast.model.save import GENERATION
from npo_fast.model.shard_files import SHARDS, load_in_place
from npo_fast.model.sharding import load_shards, shard
from npo_fast.model.weights import load_complete
from npo_fast.offline import hub
from npo_fast.run_files import read_metadata

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
    mesh: DeviceMesh | None = None,
    offload: bool = False,
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
        mesh: of the processes that share the model; each reads and keeps its shard. Adapters that
            are merged, GGUF files and 4-bit weights are whole before they are sharded.
        offload: as in ``shard``.

    Raises:
        UserError: nothing there, not a causal language model, or a library is missing.
    """
    check_libraries(quantize, lora_rank)
    torch_device = usable_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    torch_dtype = DTYPES[default_dtype(torch_device) if dtype == "auto" else dtype]
    model = _load_weights(name, torch_dtype, torch_device, quantize, mesh)
    if lora_rank:
        if hasattr(model, "peft_config"):
            raise UserError(
                f"{name!r} is an adapter on 4-bit weights, and takes no second one: start from "
                "its base model"
            )
        model = add_lora(model, model_folder(name), lora_rank, lora_alpha)
    if mesh is not None:
        model = shard(model, mesh, offload)
    lm = CausalLM(model, attention)
    if dtype == "auto" and not lm.quantized:
        lm.saved_dtype = stored_dtype(name)
    lm.max_shard_bytes = largest_shard(name)
    return lm


class _AdapterRank(TypedDict, total=False):
    r: int


def quantized_adapter_rank(name: str) -> int:
    """The rank of a LoRA adapter that trains on beside 4-bit weights; 0 where ``name`` is none."""
    folder = Path(model_folder(name))
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / QUANTIZATION).exists():
        return 0
    rank: int = read_json(folder / ADAPTER_CONFIG, _AdapterRank).get("r", 0)
    return rank


def usable_device(name: str, asked: str | None = None) -> torch.device:
    """The device of a name, "auto" being the GPU where there is one, once it has held a tensor.

    Args:
        asked: the --device that ``name`` is the share of, in messages.

    Raises:
        UserError: no such device, or this build of PyTorch or this machine cannot use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:0") from error
    try:
        if device.type == "meta":
            raise RuntimeError("it holds no data")
        gpus = torch.cuda.device_count()
        if device.type == "cuda" and 0 < gpus <= (device.index or 0):
            raise RuntimeError(f"{device} is asked for, and there are {gpus} GPUs, from cuda:0 on")
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"--device {asked or name} cannot be used here: {first_line(error):.160}. Use --device "
            "cpu, or a PyTorch that is built for it (npo-fast doctor shows this one)"
        ) from error
    return device


def _load_weights(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize,
    mesh: DeviceMesh | None = None,
) -> Any:
    folder = Path(model_folder(name))
    _check_own(folder, unread=(".pt",))
    if (folder / ADAPTER_CONFIG).is_file():
        is_4bit = quantize == "4bit" or (folder / QUANTIZATION).exists()
        on = device if mesh is None else torch.device("cpu")
        base = _load_weights(adapter_base(folder), dtype, on, "4bit" if is_4bit else "none")
        return load_adapter(base, folder)
    arguments: dict[str, Any] = {"dtype": dtype, **source_of(name)}
    is_gguf = "gguf_file" in arguments
    if quantize == "4bit":
        check_libraries(quantize, 0)
        if is_gguf:
            raise UserError("--quantize 4bit takes a model that is not quantised, not a GGUF file")
        arguments |= {"device_map": {"": device}, "quantization_config": nf4_config(dtype)}
        return keep_4bit_layout(_load_model(name, **arguments))
    if (Path(source_of(name)["pretrained_model_name_or_path"]) / SHARDS).is_dir():
        return _load_checkpoint(name, dtype).to(torch.device("cpu") if mesh else device)
    if mesh is not None and not is_gguf:
        kind = _load_class(name, dtype)
        return _load(partial(load_shards, kind, repr(name), mesh, device), name, **arguments)
    model = _load_model(name, **arguments)
    if mesh is not None:
        return _dequantised(model)
    return (_dequantised(model) if is_gguf else model).to(device)


def load_config(name: str) -> Any:
    """The configuration of a model: a name as ``load_model`` takes it, or a config.json alone."""
    is_file = name.endswith(".json")
    if is_file and not Path(name).is_file():
        raise UserError(f"no configuration file {name!r}")
    if not is_file and (Path(model_folder(name)) / ADAPTER_CONFIG).is_file():
        return load_config(adapter_base(Path(model_folder(name))))
    source = {"pretrained_model_name_or_path": name} if is_file else source_of(name)
    return _load(transformers.AutoConfig.from_pretrained, name, **source)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model by a name as ``load_model`` takes it."""
    folder = Path(model_folder(name))
    _check_own(folder, unread=(".pt", ".safetensors"))
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "tokenizer_config.json").exists():
        return load_tokenizer(adapter_base(folder))
    tokenizer = _load(
        transformers.AutoTokenizer.from_pretrained, name, "tokenizer", **source_of(name)
    )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name!r} has no end-of-sequence token: set eos_token")
    if not isinstance(longest := tokenizer.model_max_length, (int, float)):
        raise UserError(
            f"the tokenizer of {name!r} has the model_max_length {short(longest)}: set a number"
        )
    return tokenizer


def load_generation_config(name: str) -> Any:
    """The generation config of a model by a name as ``load_model`` takes it; None without one.

    Raises:
        UserError: it is damaged.
    """
    folder = Path(model_folder(name))
    file = folder / GENERATION
    load = transformers.GenerationConfig.from_pretrained
    if file.exists():
        with reading(file, "mend or delete it"):
            return load(str(folder))
    try:
        if (folder / ADAPTER_CONFIG).is_file():
            return load_generation_config(adapter_base(folder))
        source = source_of(name)
        with nullcontext() if folder.exists() else hub(repr(name)):
            return None if "gguf_file" in source else load(source["pretrained_model_name_or_path"])
    except (OSError, ValueError):  # such as a folder with a tokenizer alone
        return None


def default_dtype(device: torch.device) -> Literal["fp32", "bf16"]:
    """What dtype "auto" means on a device."""
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bf16" if half else "fp32"


def _check_own(folder: Path, unread: tuple[str, ...]) -> None:
    """Checks a model that lies in the folder of its run against the manifest beside it.

    Raises:
        UserError: a file changed since it was saved; it is taken as it is without a manifest.
    """
    manifest, parents = folder / MANIFEST, folder.resolve().parents[:2]
    run = next((path for p in parents if (path := p / "run.json").is_file()), None)
    if run is None or not manifest.is_file():
        return
    try:
        check_saved(folder, read_metadata(run.parent).get("id"), unread)
    except (UserError, DamagedError) as error:
        raise UserError(
            f"{error}. Restore it, or delete {manifest} to take the model as it is now"
        ) from error


def stored_dtype(name: str) -> torch.dtype | None:
    """The dtype of the weights in the files of a model; None where they do not say."""
    folder = Path(model_folder(name))
    if (folder / ADAPTER_CONFIG).is_file():
        return stored_dtype(adapter_base(folder))
    source = source_of(name)
    if "gguf_file" in source:  # of several widths
        return None
    dtype = load_config(name).get_text_config().dtype
    if dtype is None:
        for file in sorted(folder.glob("*.safetensors"))[:1]:
            with safe_open(file, framework="pt") as tensors:
                dtype = tensors.get_tensor(next(iter(tensors.keys()))).dtype
    return dtype


def _load_checkpoint(name: str, dtype: torch.dtype) -> Any:
    """The model in a checkpoint of several processes, whole."""
    folder = Path(model_folder(name))
    model = transformers.AutoModelForCausalLM.from_config(load_config(name), dtype=dtype)
    weights = {f"{WEIGHTS}/{name}": p for name, p in model.named_parameters()}
    with reading(f"the checkpoint {folder}"):
        load_in_place(weights, folder / SHARDS)
    model.name_or_path = str(folder)
    return model.eval()


def _load_class(name: str, dtype: torch.dtype) -> Any:
    """The class of the model that a configuration asks for."""
    with torch.device("meta"):
        config = load_config(name)
        return type(transformers.AutoModelForCausalLM.from_config(config, dtype=dtype))


def _load_model(name: str, **arguments: Any) -> Any:
    load = partial(load_complete, transformers.AutoModelForCausalLM, repr(name))
    return _load(load, name, **arguments)


def _load(
    load: Callable[..., Any], name: str, kind: str = "causal language model", **arguments: Any
) -> Any:
    path = Path(arguments["pretrained_model_name_or_path"])
    if path.is_dir():
        check_folder(path)
        _check_sizes(path / "config.json")
    access = no_progress_bars() if path.exists() else hub(repr(name))
    with reading(f"{name!r} as a {kind}"), access:
        try:
            return load(trust_remote_code=False, **arguments)
        except ImportError as error:
            raise UserError(
                f"cannot load {name!r}: {first_line(error)}; install what it names, such as pip "
                "install gguf accelerate"
            ) from error
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"{name!r} comes with code of its own, which is never run: name a model of an "
                "architecture that transformers has, or load it yourself and pass model and "
                "tokenizer to npo_fast's functions"
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
