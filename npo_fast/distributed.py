"""Several processes that train one model (``torchrun``): which of them this is, how they meet.

Every process reads the same data in the same order and takes its share of each step. Only the main
process writes files and messages.
"""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from npo_fast import watch
from npo_fast.errors import UserError, first_line
from npo_fast.watch import limits

# of a collective; the watch ends a process long before, unless another one writes a large model
TIMEOUT = timedelta(days=7)

_store: dist.Store | None = None  # of what processes announce
_mesh: DeviceMesh | None = None
_background: dist.ProcessGroup | None = None
_connections: set[tuple[int, int]] = set()  # of groups of processes on the CPU
_meetings = 0  # that have ended: a store keeps the addresses of each


def rank() -> int:
    """The number of this process, from 0, as ``torchrun`` sets it."""
    return _number("RANK", 0)


def local_rank() -> int:
    """The number of this process among those of its machine, from 0, as ``torchrun`` sets it."""
    return _number("LOCAL_RANK", 0)


def world_size() -> int:
    """The number of processes, as ``torchrun`` sets it; 1 without it."""
    return _number("WORLD_SIZE", 1)


def launch() -> str | None:
    """What ``torchrun`` calls this start of the processes and its restarts; None without it."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def restarts() -> int:
    """How often ``torchrun`` has started the processes again after a failure (--max-restarts)."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def check_launch() -> None:
    """Raises ``UserError`` where a variable that ``torchrun`` sets is no whole number."""
    for read in (rank, local_rank, world_size, restarts):
        read()


def _number(variable: str, default: int) -> int:
    """A variable that ``torchrun`` sets."""
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal():
        raise UserError(f"{variable} is {text!r}, not a number: start with torchrun, or unset it")
    return int(text)


def is_main_process() -> bool:
    """Whether this is the process that writes files and messages."""
    return rank() == 0


def local_device(device: str) -> torch.device:
    """``device``, or for "auto" and "cuda" the GPU of this process."""
    if world_size() > 1 and ":" in device:
        raise UserError(f"--device {device} is one GPU for {world_size()} processes: say cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank()}"
    return torch.device(device)


def init_process_group(device: torch.device, **arguments: Any) -> DeviceMesh:
    """Meets the other processes; returns the mesh of all of them.

    From here on ``npo_fast.watch`` ends this process where another one fails.

    ``init_method``, ``rank`` and ``world_size`` are for callers without ``torchrun``.
    """
    global _store, _mesh
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return _mesh or init_device_mesh(device.type, (dist.get_world_size(),))
    backend = "nccl" if device.type == "cuda" else "gloo"
    url = arguments.pop("init_method", "env://")
    limit = timedelta(seconds=limits.MEETING_LIMIT_S)
    try:
        store, this, count = next(dist.rendezvous(url, **arguments, timeout=limit))
    except ValueError as error:  # of variables that torchrun sets
        raise UserError(
            f"WORLD_SIZE is {world_size()}, and the other processes cannot be met: start all with "
            f"torchrun, or this one alone without WORLD_SIZE ({first_line(error)})"
        ) from error
    store.set_timeout(limit)
    # torchrun keeps its store when it restarts, with the addresses of processes that have ended
    store = dist.PrefixStore(f"npo_fast/attempt_{restarts()}/{_meetings}", store)
    _store = dist.PrefixStore("announced", store)
    watch.start(dist.PrefixStore("watch", store), this, count)
    with _noted_connections():
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=this, world_size=count)
    if _mesh is None:  # of an earlier meeting: PyTorch keeps what it has learned of its tensors
        _mesh = init_device_mesh(device.type, (count,))
    return _mesh


def background_group() -> dist.ProcessGroup:
    """A group of all processes on the CPU, apart from what a training step waits for."""
    global _background
    if _background is None:
        with _noted_connections():
            _background = dist.new_group(backend="gloo")
    return _background


def destroy_process_group() -> None:
    """Leaves the other processes, if there are any; they may meet again."""
    global _meetings, _background
    watch.stop()
    if dist.is_initialized():
        _meetings += 1
        _background = None
        if _mesh is not None:
            # by name, new in PyTorch 2.13; connections end with the last reference
            getattr(_mesh, "_pg_registry", {}).clear()
        dist.destroy_process_group()


def leave() -> None:
    """Leaves the other processes at once: their collectives end with an error, and so do ours.

    gloo would end its connections with the last reference to a group, whoever has that.
    """
    for descriptor, identity in _connections:
        with suppress(OSError):
            if _identity(descriptor) == identity:
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    connection.getpeername()  # a listener has none, and must not end
                    connection.shutdown(socket.SHUT_RDWR)
    _connections.clear()
    destroy_process_group()


@contextmanager
def _noted_connections() -> Iterator[None]:
    """Notes the sockets that are opened inside."""
    before = _sockets()
    yield
    _connections.update(_sockets() - before)


def _sockets() -> set[tuple[int, int]]:
    """Descriptors and identities of this process's sockets; none where the system has no list."""
    descriptors = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    sockets = set()
    for descriptor in map(int, descriptors):
        with suppress(OSError):
            sockets.add((descriptor, _identity(descriptor)))
    return sockets


def _identity(descriptor: int) -> int:
    """What tells a socket from a later one of the same number; ``OSError`` for what is none."""
    status = os.fstat(descriptor)
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError(f"{descriptor} is no socket")
    return status.st_ino


def announce(key: str, value: str) -> None:
    """Says something to the processes that share the store, once; the first to say it counts."""
    if _store is not None:
        _store.compare_set(key, "", value)


def announced(key: str) -> str | None:
    """What one of the processes has announced; None where none has."""
    if _store is None or not _store.check([key]):
        return None
    return _store.get(key).decode()


def all_reduce_max(value: int, device: torch.device, group: dist.ProcessGroup | None = None) -> int:
    """The largest value of the processes of ``group``, or of all processes."""
    if group is None and world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return int(largest)


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each process of ``group`` has, in the order of ranks; of one process what it has."""
    if group is None and world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(value: Any) -> Any:
    """What the main process has."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def local_of(value: torch.Tensor) -> torch.Tensor:
    """The value, or this process's shard of it."""
    return value.to_local() if isinstance(value, DTensor) else value


def full(value: torch.Tensor) -> torch.Tensor:
    """The value, or what all processes have of it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def rows_of(length: int, rank: int, world_size: int) -> tuple[int, int]:
    """The first row, and the number of rows, that a process has of ``length``.

    As ``torch.chunk`` cuts, so the last may be fewer, or none.
    """
    most = -(-length // world_size)
    first = min(length, rank * most)
    return first, min(most, length - first)


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error of the communication library says that another process is gone."""
    words = ("Connection", "connection", "Broken pipe", "remote process", "imed out", "imeout")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
