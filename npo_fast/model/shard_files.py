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
from torch import Tensor
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    _consolidate_safetensors_files,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from npo_fast.distributed import background_group, gather_objects, is_main_process, rank
from npo_fast.errors import first_line
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.save import cannot_write

SHARDS = "shards"  # the folder of a checkpoint in PyTorch's own form
SHARD_BYTES = 5 << 30  # of a file of weights, where the model came in one


def save_as_hugging_face(lm: CausalLM, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the files of weights of a model that ``from_pretrained`` reads.

    All processes call it. Each writes its rows, then puts a share of the files together.

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
    numbers = _files(weights, lm.max_shard_bytes or SHARD_BYTES)
    count, rows = max(numbers.values()), folder / "rows"
    files = {
        name: f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else SAFE_WEIGHTS_NAME
        for name, number in numbers.items()
    }
    own = {name: file for name, file in files.items() if numbers[name] % lm.world_size == lm.rank}

    def write_rows() -> None:
        writer = dcp.HuggingFaceStorageWriter(
            path=str(rows), fqn_to_index_mapping=numbers, save_distributed=True
        )
        dcp.save(weights, storage_writer=writer)

    def put_together() -> None:
        if own:  # without a collective, in which others would wait for one that fails
            _consolidate_safetensors_files(str(rows), str(folder), own, num_threads=1)
        if is_main_process() and count > 1:
            size = sum(weight.numel() * weight.itemsize for weight in weights.values())
            index = {"metadata": {"total_size": size}, "weight_map": files}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2))

    together(write_rows)
    together(put_together)
    if is_main_process():
        shutil.rmtree(rows)


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
