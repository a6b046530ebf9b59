"""Optimizer states of a sharded model as named tensors, for any number of processes to go on with.

A state is a ``DTensor`` in the rows of its parameter. One with 8 bits a value (torchao) is made of
codes and of a scale a block: each process then names its own pieces, ``…/codes/0``. The same number
of processes restores them as they were; another number rounds them anew.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from npo_fast.distributed import local_of, rows_of
from npo_fast.model.shard_files import load_in_place, saved_sizes
from npo_fast.trainer.optimizers import is_step_count, parameters_of

OPTIMIZER = "optimizer"
Names = Mapping[Tensor, str]  # of the model's parameters


def tensors_of(optimizer: torch.optim.Optimizer, names: Names, rank: int) -> dict[str, Tensor]:
    """This process's shards of all states by name, but for step counts."""
    content: dict[str, Tensor] = {}
    for _, key, state in _states(optimizer, names):
        local: Any = local_of(state)
        if not _in_8_bits(optimizer):
            content[key] = state
        elif hasattr(local, "codes"):
            content |= {f"{key}/codes/{rank}": local.codes, f"{key}/scale/{rank}": local.scale}
        else:
            content[f"{key}/values/{rank}"] = local
    return content


def local_states(optimizer: torch.optim.Optimizer, names: Names) -> dict[str, Tensor]:
    """This process's rows of all states by name, in CPU memory."""
    return {key: local_of(state).cpu() for _, key, state in _states(optimizer, names)}


def restore_held(
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],
    names: Names,
    held: Mapping[str, Tensor],
) -> None:
    """Restores ``local_states`` into an optimizer of the same shards."""
    _begin(optimizer, saved)
    for _, key, state in _states(optimizer, names):
        local_of(state).copy_(held[key])


def without_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict of an optimizer with step counts alone."""
    counts = {
        i: {name: value for name, value in states.items() if is_step_count(value)}
        for i, states in state["state"].items()
    }
    return {**state, "state": counts}


def restore(
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],  # its state dict; without tensors where they lie in ``shards``
    names: Names,
    rank: int,
    world_size: int,
    shards: Path | None,
    saved_by: int,  # processes
) -> None:
    """Restores the states of a sharded optimizer, or those that several processes have saved."""
    _begin(optimizer, saved)
    if shards is None:  # whole, as one process has saved it
        for i, states in saved["state"].items():
            parameter = parameters_of(optimizer)[i]
            first, rows = rows_of(len(parameter), rank, world_size)
            for name, value in states.items():
                if not is_step_count(value):
                    whole = value.dequantize() if hasattr(value, "codes") else value
                    local_of(optimizer.state[parameter][name]).copy_(whole[first : first + rows])
        return
    sizes = saved_sizes(shards)
    whole = {key: state for _, key, state in _states(optimizer, names) if key in sizes}
    load_in_place(whole, shards)
    for parameter, key, state in _states(optimizer, names):
        if key not in sizes:
            _restore_pieces(parameter, key, state, rank, world_size, saved_by, shards, sizes)


def _restore_pieces(
    parameter: Tensor,
    key: str,
    state: Tensor,
    rank: int,
    world_size: int,
    saved_by: int,
    shards: Path,
    sizes: Mapping[str, torch.Size],
) -> None:
    local: Any = local_of(state)
    if world_size == saved_by and hasattr(local, "codes"):
        pieces = {f"{key}/codes/{rank}": local.codes, f"{key}/scale/{rank}": local.scale}
        if pieces.keys() <= sizes.keys():
            load_in_place(pieces, shards)
            return
    first, rows = rows_of(len(parameter), rank, world_size)
    values = torch.empty(rows, *parameter.shape[1:])
    for other in range(saved_by):
        start, count = rows_of(len(parameter), other, saved_by)
        begin, end = max(first, start), min(first + rows, start + count)
        if begin < end:
            piece = _piece(key, other, shards, sizes)
            values[begin - first : end - first] = piece[begin - start : end - start]
    local.copy_(values.to(local.dtype))


def _piece(key: str, rank: int, shards: Path, sizes: Mapping[str, torch.Size]) -> Tensor:
    """What one process has saved of a state."""
    if (name := f"{key}/values/{rank}") in sizes:
        values = torch.empty(sizes[name])
        load_in_place({name: values}, shards)
        return values
    from torchao.optim.subclass_8bit import OptimState8bit

    state: Any = OptimState8bit.zeros(sizes[f"{key}/codes/{rank}"], signed=key.endswith("exp_avg"))
    load_in_place({f"{key}/codes/{rank}": state.codes, f"{key}/scale/{rank}": state.scale}, shards)
    return state.dequantize()


def _begin(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restores all but the tensors, for which it makes room: a step of rate 0, gradients of 0."""
    optimizer.load_state_dict({**saved, "state": {}})
    parameters = {i: parameters_of(optimizer)[i] for i in saved["state"]}
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    _set_rates(optimizer, [0.0] * len(rates))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None
    _set_rates(optimizer, rates)
    for i, parameter in parameters.items():
        for name, value in saved["state"][i].items():
            if is_step_count(value):
                optimizer.state[parameter][name].copy_(value)


def _set_rates(optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _states(
    optimizer: torch.optim.Optimizer, names: Names
) -> Iterator[tuple[Parameter, str, Tensor]]:
    """Each parameter, the name of a state of it, and the state."""
    for parameter in parameters_of(optimizer):
        for name, state in optimizer.state.get(parameter, {}).items():
            if isinstance(state, Tensor) and not is_step_count(state):
                yield parameter, f"{OPTIMIZER}/{names[parameter]}/{name}", state


def _in_8_bits(optimizer: torch.optim.Optimizer) -> bool:
    return "8bit" in type(optimizer).__name__
