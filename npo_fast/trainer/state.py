"""What a checkpoint holds beside the weights: a resumed run equals one that never stopped."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npo_fast.distributed import local_of, world_size
from npo_fast.errors import first_line
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.manifest import DamagedError
from npo_fast.model.shard_files import SHARDS
from npo_fast.trainer.shards import (
    local_states,
    restore,
    restore_held,
    tensors_of,
    without_tensors,
)

FORMAT = 2
STATE = "state.pt"


class TrainState:
    """Where a run stands after ``step`` steps.

    The order of the data is a function of the seed and the step, and needs no state. The loop
    calls ``attach`` with what has a state dict: optimizer and learning rate schedule. A state that
    was loaded from a checkpoint then restores their state dicts and the random numbers.
    """

    def __init__(self, step: int = 0, micro_batch_tokens: int | None = None) -> None:
        self.step = step
        self.micro_batch_tokens = micro_batch_tokens  # None: as the settings say
        self._parts: dict[str, Any] = {}
        self._lm: CausalLM | None = None
        self._saved: dict[str, Any] = {}
        self._folder: Path | None = None  # of the checkpoint that it was loaded from
        self.weights: dict[str, Tensor] = {}  # of ``held``
        self._held: dict[str, Tensor] = {}

    def attach(self, lm: CausalLM, **parts: Any) -> None:
        """Names what will be saved, and restores it where this state was loaded.

        Random numbers are restored for a process alone, not for one of several.
        """
        self._parts, self._lm = parts, lm
        if not self._saved:
            return
        for name, part in parts.items():
            saved = self._saved["parts"][name]
            if isinstance(part, torch.optim.Optimizer) and (lm.world_size > 1 or self._shards):
                saved_by = self._saved.get("processes", 1)
                names = {p: n for n, p in lm.model.named_parameters()}
                if self._held:
                    restore_held(part, saved, names, self._held)
                else:
                    restore(part, saved, names, lm.rank, lm.world_size, self._shards, saved_by)
            else:
                part.load_state_dict(saved)
        if lm.world_size == 1:
            set_random_state(self._saved["random"], lm.device)
        self._saved, self._held, self.weights = {}, {}, {}

    def held(self, micro_batch_tokens: int) -> "TrainState":
        """This state with the tensors that this process has, to go on with another model.

        Weights are ``weights``, by name. It outlives the process group.
        """
        assert self._lm is not None
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        names = {p: n for n, p in self._lm.model.named_parameters()}
        state = TrainState(self.step, micro_batch_tokens)
        state.weights = {n: local_of(p.detach()).cpu() for p, n in names.items() if p.requires_grad}
        state._held = local_states(self._parts["optimizer"], names)
        parts["optimizer"] = without_tensors(parts["optimizer"])
        state._saved = {"parts": parts, "processes": self._lm.world_size}
        return state

    @torch.no_grad()
    def restore_weights(self, lm: CausalLM) -> None:
        """Puts ``weights`` into the model, whose shards are the same."""
        parameters = dict(lm.model.named_parameters())
        for name, value in self.weights.items():
            local_of(parameters[name].detach()).copy_(value)

    @property
    def _shards(self) -> Path | None:
        shards = None if self._folder is None else self._folder / SHARDS
        return shards if shards is not None and shards.is_dir() else None

    def tensors(self) -> dict[str, Tensor]:
        """This process's shards of the optimizer's states, by name."""
        assert self._lm is not None
        names = {p: n for n, p in self._lm.model.named_parameters()}
        return tensors_of(self._parts["optimizer"], names, self._lm.rank)

    def writer(self) -> Callable[[Path], None]:
        """A function that writes ``state.pt`` beside the files of a checkpoint folder.

        Of several processes the main one calls it, and ``tensors`` are saved beside.
        """
        assert self._lm is not None
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        if self._lm.world_size > 1:
            parts["optimizer"] = without_tensors(parts["optimizer"])
        content = {
            "format": FORMAT,
            "step": self.step,
            "micro_batch_tokens": self.micro_batch_tokens,
            "processes": self._lm.world_size,
            "parts": parts,
            "random": random_state(self._lm.device),
        }
        return lambda folder: save_tensors(content, folder / STATE)

    @classmethod
    def load(cls, folder: Path) -> "TrainState":
        """Reads ``state.pt``; ``DamagedError`` where that cannot be read."""
        saved = load_tensors(folder / STATE)
        if saved.get("format") != FORMAT:
            raise DamagedError(
                f"{folder / STATE} has the format {saved.get('format')}, not {FORMAT}"
            )
        state = cls(saved["step"], saved["micro_batch_tokens"])
        state._saved, state._folder = saved, folder
        return state


def save_tensors(content: Mapping[str, Any], file: Path) -> None:
    """Writes a file that ``load_tensors`` reads; a full disk is an ``OSError`` as elsewhere."""
    try:
        with file.open("wb") as stream:
            torch.save(dict(content), stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save may cover it with its own error
            raise error.__context__ from None
        raise


def load_tensors(file: Path) -> dict[str, Any]:
    """Reads what ``save_tensors`` wrote, to CPU memory; ``DamagedError`` where it cannot."""
    if file.exists() and not file.is_file():
        raise DamagedError(f"{file} cannot be read: it is no file")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=world_size() > 1)
    except FileNotFoundError:
        raise DamagedError(f"cannot read {file} (it is missing)") from None
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise DamagedError(f"{file} cannot be read: {first_line(error)}") from error


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the random number generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restores what ``random_state`` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
