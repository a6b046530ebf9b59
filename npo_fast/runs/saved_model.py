"""A model with its tokenizer as one folder: how every process of a run takes part in saving it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from npo_fast import watch
from npo_fast.distributed import all_reduce_max, is_main_process
from npo_fast.errors import CannotSaveError
from npo_fast.model.adapters import no_progress_bars, write_weights
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.manifest import write_manifest
from npo_fast.model.save import save_folder, save_tokenizer
from npo_fast.model.sharding import gather_state_dict


def wait_for_all(lm: CausalLM) -> None:
    """Waits until the first rank has written; where it fails, the others are killed."""
    if lm.world_size > 1:
        all_reduce_max(0, lm.device)


def save_model(
    lm: CausalLM,
    tokenizer: Any,
    folder: Path,
    more: Callable[[Path], object] | None = None,
    replace: bool = True,
    dtype: torch.dtype | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
    put: Callable[[Path, Callable[[Path], None]], object] = save_folder,
) -> None:
    """Model and tokenizer, and what ``more`` writes, as one folder that is complete or absent.

    All processes call it: the weights of a sharded model are gathered, and the first one writes.

    Args:
        facts: of its manifest.
        put: puts what its second argument writes into a folder, or into another one.
    """
    weights = None
    if lm.vocabulary_slice is not None:
        weights = gather_state_dict(lm.model.state_dict(keep_vars=True))

    def write(where: Path) -> None:
        with no_progress_bars():
            write_weights(lm, where, weights, dtype)
        save_tokenizer(tokenizer, where)
        if more is not None:
            more(where)
        write_manifest(where, **facts)

    try:
        if is_main_process() and (replace or not folder.exists()):
            with watch.undisturbed():
                put(folder, write)
    except CannotSaveError:
        wait_for_all(lm)  # the run may go on, and so do the others
        raise
    wait_for_all(lm)
