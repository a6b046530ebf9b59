"""Weights of a sharded model as files: each process writes its rows, none holds the whole model.

PyTorch's distributed checkpoint writes them, in its own form (``save_in_background``) or as files
of a Hugging Face model (``save_as_hugging_face``).
"""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    _consolidate_safetensors_files,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from npo_fast.distributed import background_group, gather_objects, is_main_process, rank
from npo_fast.errors import first_line
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.layers import repeated_layers
from npo_fast.model.save import cannot_write
from npo_fast.model.sharding import gather_state_dict

SHARDS = "shards"  # the folder of a checkpoint in PyTorch's own form
SHARD_BYTES = 5 << 30  # of a file of weights, where the model came in one


def save_as_hugging_face(lm: CausalLM, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the files of weights of a model that ``from_pretrained`` reads.

    All processes call it. Each writes its rows, then puts a share of the files together. Weights
    that files have under other names or in other shapes are gathered a layer at a time, and the
    first process writes them.

    Args:
        dtype: of the files, where it is not that of the model.

    Raises:
        OSError: a process cannot write its part; all raise it.
    """
    weights = {
        name: p.detach() if dtype is None or p.dtype != lm.dtype else p.detach().to(dtype)
        for name, p in lm.model.named_parameters()
    }
    buffers = {*dict(lm.model.named_buffers())} & {*lm.model.state_dict()}
    weights |= {name: lm.model.get_buffer(name) for name in sorted(buffers)}
    most_bytes = lm.max_shard_bytes or SHARD_BYTES
    if getattr(lm.model, "_weight_conversions", None):
        _save_layers(lm, weights, folder, most_bytes)
        return
    numbers, rows = _files(weights, most_bytes), folder / "rows"
    files = {name: _file(number, max(numbers.values())) for name, number in numbers.items()}
    own = {name: file for name, file in files.items() if numbers[name] % lm.world_size == lm.rank}

    def write_rows() -> None:
        writer = dcp.HuggingFaceStorageWriter(
            path=str(rows), fqn_to_index_mapping=numbers, save_distributed=True
        )
        dcp.save(weights, storage_writer=writer)

    def put_together() -> None:
        if own:  # without a collective, in which others would wait for one that fails
            _consolidate_safetensors_files(str(rows), str(folder), own, num_threads=1)
        if is_main_process():
            _write_index(folder, files, sum(w.numel() * w.itemsize for w in weights.values()))

    together(write_rows)
    together(put_together)
    if is_main_process():
        shutil.rmtree(rows)


def _save_layers(
    lm: CausalLM, weights: Mapping[str, Tensor], folder: Path, most_bytes: int
) -> None:
    """Gathers a layer at a time; the first process has transformers convert it, and writes it."""
    held: dict[str, Tensor] = {}  # of the next file
    written: list[list[str]] = []
    size = 0
    failure: Exception | None = None

    def write_file() -> None:
        save_file(held, folder / f"part-{len(written)}.safetensors", metadata={"format": "pt"})
        written.append([*held])
        held.clear()

    for layer in _by_layer(lm, weights):
        whole = gather_state_dict(layer)
        if failure is not None or not is_main_process():
            continue
        try:
            for name, tensor in revert_weight_conversion(lm.model, whole).items():
                if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > most_bytes:
                    write_file()
                held[name] = tensor.cpu().contiguous()
                size += tensor.nbytes
        except (OSError, SafetensorError) as error:  # the others go on gathering
            failure = error

    def finish() -> None:
        if failure is not None:
            raise failure
        if not is_main_process():
            return
        write_file()
        files: dict[str, str] = {}
        for number, names in enumerate(written):
            file = _file(number + 1, len(written))
            (folder / f"part-{number}.safetensors").rename(folder / file)
            files |= dict.fromkeys(names, file)
        _write_index(folder, files, size)

    together(finish)


def _by_layer(lm: CausalLM, weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Weights of each decoder layer, and of what is outside of them."""
    layers = {*repeated_layers(lm.decoder)}
    prefixes = [f"{name}." for name, module in lm.model.named_modules() if module in layers]
    groups: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        groups.setdefault(prefix, {})[name] = weight
    return [*groups.values()]


def _file(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else SAFE_WEIGHTS_NAME


def _write_index(folder: Path, files: Mapping[str, str], size: int) -> None:
    """Writes which file has a weight, where there are several."""
    if len({*files.values()}) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2))


def save_in_background(content: Mapping[str, Tensor], folder: Path) -> Future[Any]:
    """Writes this process's shards of named tensors, in the background.

    All processes call it. They may change the tensors as soon as it returns.
    """
    writer = dcp.FileSystemWriter(str(folder), sync_files=True)
    return dcp.async_save(  # type: ignore[return-value]
        {name: _copy_on_cpu(tensor) for name, tensor in content.items()},
        storage_writer=writer, process_group=background_group(), async_stager=_Staged(),
    )  # fmt: skip


class _Staged(AsyncStager):
    """Takes copies as they are: PyTorch's stagers fail on shards that lie in padded memory."""

    should_synchronize_after_execute = False

    def stage(self, state_dict: Any) -> Any:
        return state_dict

    def synchronize_staging(self) -> None:
        return

    def close(self) -> None:
        pass


def _copy_on_cpu(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


def load_in_place(content: Mapping[str, Tensor], folder: Path) -> None:
    """Reads into named tensors, in place, what any number of processes has written.

    Each process reads its own shards; those of different processes may have different names.
    """
    if not content:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that each process reads alone
        reader = dcp.FileSystemReader(str(folder))
        dcp.load({k: v.detach() for k, v in content.items()}, storage_reader=reader, no_dist=True)


def saved_sizes(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that ``save_in_background`` wrote."""
    metadata = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    return {name: getattr(each, "size", torch.Size()) for name, each in metadata.items()}


def _files(weights: Mapping[str, Tensor], most_bytes: int) -> dict[str, int]:
    """The number of the file, from 1, that each weight goes to."""
    numbers, number, size = {}, 1, 0
    for name, weight in weights.items():
        nbytes = weight.numel() * weight.itemsize
        if size and size + nbytes > most_bytes:
            number, size = number + 1, 0
        numbers[name], size = number, size + nbytes
    return numbers


def together(write: Callable[[], object]) -> None:
    """Calls ``write`` on all processes; where a file cannot be written, all raise ``OSError``."""
    reason = ""
    try:
        write()
    except CheckpointException as error:
        failed_on, (cause, _) = next(iter(error.failures.items()))
        if not cannot_write(cause):
            raise
        # all are told of it; the one that failed tells
        reason = f"{type(cause).__name__}: {first_line(cause)}" if failed_on == rank() else ""
    except Exception as cause:
        if not cannot_write(cause):
            raise
        reason = f"{type(cause).__name__}: {first_line(cause)}"
    reasons = gather_objects(reason)
    if failed := [number for number, each in enumerate(reasons) if each]:
        where = f" (process {failed[0]})" if len(reasons) > 1 else ""
        raise OSError(f"{reasons[failed[0]]}{where}")
