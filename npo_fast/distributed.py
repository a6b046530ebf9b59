"""Several processes that train one model (``torchrun``): which one this is, and what all agree on.

Every process reads the same data in the same order and takes its share of each step. The first one
alone writes files and speaks.
"""

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from npo_fast.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

PATIENCE = timedelta(minutes=30)  # the first process may be writing a large model meanwhile


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    return rank() == 0


def own_device(device: str) -> "torch.device":
    """``device``, or for "auto" and "cuda" the GPU that is this process's own.

    Raises:
        UserError: one GPU by its number, for several processes.
    """
    import torch

    if world_size() > 1 and ":" in device:
        raise UserError(f"--device {device} is one GPU for {world_size()} processes: say cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(device)


def init_process_group(device: "torch.device", **arguments: Any) -> "DeviceMesh":
    """Meets the other processes; returns the mesh of all of them.

    Args:
        arguments: of ``init_process_group``; its environment variables where there are none.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, **arguments)
    return init_device_mesh(device.type, (dist.get_world_size(),))


def destroy_process_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_max(value: int, device: "torch.device", group: "ProcessGroup | None" = None) -> int:
    """The largest value of the processes of ``group``, or of all; its own where it is alone."""
    import torch
    import torch.distributed as dist

    if group is None and world_size() == 1:
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return int(found)


def is_lost_contact(error: BaseException) -> bool:
    """Whether another process has gone, by the word of the library that talks to it."""
    words = ("Connection", "connection", "Broken pipe", "remote process", "imed out", "imeout")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
