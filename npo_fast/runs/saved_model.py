"""A model with its tokenizer as one folder: how every process of a run takes part in saving it."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from npo_fast import watch
from npo_fast.distributed import (
    all_reduce_max,
    broadcast_object,
    gather_objects,
    is_main_process,
    rank,
)
from npo_fast.model.adapters import WEIGHTS, no_progress_bars, write_weights
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.manifest import sha256_of_file, write_manifest
from npo_fast.model.save import (
    begin_folder,
    cannot_save,
    complete_folder,
    partial_of,
    save_folder,
    save_tokenizer,
)
from npo_fast.model.shard_files import SHARDS, save_as_hugging_face, save_in_background, together
from npo_fast.model.sharding import gather_state_dict
from npo_fast.trainer.state import TrainState

Write = Callable[[Path], object]
Put = Callable[[Path, Callable[[Path], None]], object]


def wait_for_all(lm: CausalLM) -> None:
    """Waits until the first rank has written; where it fails, the others are killed."""
    if lm.world_size > 1:
        all_reduce_max(0, lm.device)


def save_model(
    lm: CausalLM,
    tokenizer: Any,
    folder: Path,
    more: Write | None = None,
    replace: bool = True,
    dtype: torch.dtype | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
    put: Put = save_folder,
) -> None:
    """Model and tokenizer, and what ``more`` writes, as one folder that is complete or absent.

    All processes call it. Each writes its rows of the weights; adapters are gathered, and the first
    process writes them.

    Args:
        facts: of its manifest.
        put: puts what its second argument writes into a folder, or into another one.
    """
    weights: dict[str, Tensor] | None = None
    by_rows = lm.world_size > 1 and not lm.adapted
    if by_rows:
        weights = {}
    elif lm.world_size > 1:
        weights = _gathered_adapter(lm)

    def write(where: Path) -> None:
        with no_progress_bars():
            write_weights(lm, where, weights, dtype)
        save_tokenizer(tokenizer, where)
        if more is not None:
            more(where)

    def write_rows(where: Path) -> dict[str, str]:
        if by_rows:
            save_as_hugging_face(lm, where, dtype)
        return {}

    if broadcast_object(replace or not folder.exists()):
        _put(lm, folder, write, write_rows, facts, put)


def save_checkpoint(
    lm: CausalLM,
    tokenizer: Any,
    folder: Path,
    state: TrainState,
    facts: Mapping[str, Any],
    put: Put = save_folder,
) -> None:
    """What several processes need to go on: each writes its shards. All processes call it."""
    write, content = _checkpoint(lm, tokenizer, state)
    if broadcast_object(not folder.exists()):
        _put(lm, folder, write, lambda where: _write_shards(content, where), facts, put)


class BackgroundCheckpoint:
    """``save_checkpoint`` while training goes on. All processes call each method together."""

    def __init__(
        self,
        lm: CausalLM,
        tokenizer: Any,
        folder: Path,
        state: TrainState,
        facts: Mapping[str, Any],
    ) -> None:
        self.folder, self.facts = folder, facts
        write, content = _checkpoint(lm, tokenizer, state)

        def begin() -> None:
            if is_main_process():
                begin_folder(folder)
                write(partial_of(folder))

        with self._or_none():
            together(begin)
        self._saved = save_in_background(content, partial_of(folder) / SHARDS)
        threads = ThreadPoolExecutor(1)
        self._sums: Future[dict[str, str]] = threads.submit(self._sum)
        threads.shutdown(wait=False)  # ends when that is done

    def _sum(self) -> dict[str, str]:
        self._saved.result()
        return _own_sums(partial_of(self.folder))

    def is_written(self, lm: CausalLM) -> bool:
        """Whether all processes have written their shards, or failed to."""
        return not lm.all_reduce_max(int(not self._sums.done()))

    def complete(self) -> None:
        """Waits for all, and puts the folder in its place; ``CannotSaveError`` leaves none."""
        with self._or_none():
            together(self._sums.result)
            sums = _merged(self._sums.result())

            def end() -> None:
                if is_main_process():
                    write_manifest(partial_of(self.folder), known=sums, **self.facts)
                    complete_folder(self.folder)

            together(end)

    @contextmanager
    def _or_none(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if is_main_process():
                shutil.rmtree(partial_of(self.folder), ignore_errors=True)
            raise cannot_save(self.folder, error) from error


def _gathered_adapter(lm: CausalLM) -> dict[str, Tensor]:
    state = lm.model.state_dict(keep_vars=True)
    trained: dict[str, Tensor] = gather_state_dict(
        {name: p for name, p in state.items() if p.requires_grad}
    )
    return trained


def _checkpoint(
    lm: CausalLM, tokenizer: Any, state: TrainState
) -> tuple[Callable[[Path], None], dict[str, Tensor]]:
    """What the first process writes, and the tensors of which each writes its shards."""
    writer = state.writer()
    content = state.tensors()
    weights: dict[str, Tensor] = {}
    if lm.adapted:
        weights = _gathered_adapter(lm)
    else:
        content |= {f"{WEIGHTS}/{name}": p.detach() for name, p in lm.model.named_parameters()}

    def write(where: Path) -> None:
        with no_progress_bars():
            write_weights(lm, where, weights)
        save_tokenizer(tokenizer, where)
        writer(where)

    return write, content


def _put(
    lm: CausalLM,
    folder: Path,
    write: Write,  # by the first process
    write_shards: Callable[[Path], dict[str, str]],  # by all; SHA-256 of files
    facts: Mapping[str, Any],
    put: Put,
) -> None:
    """Calls ``put`` on the first process; wherever it writes, the others write their shards."""

    def write_all(where: Path) -> dict[str, str]:
        together(lambda: write(where) if is_main_process() else None)
        return write_shards(where)

    def lead(where: Path) -> None:
        broadcast_object(where)
        sums = write_all(where)
        write_manifest(where, known=sums, **facts)

    if is_main_process():
        try:
            with watch.undisturbed():
                put(folder, lead)
        finally:
            broadcast_object(None)
    else:
        while (where := broadcast_object(None)) is not None:
            with suppress(OSError):
                write_all(where)
    wait_for_all(lm)


def _write_shards(content: Mapping[str, Tensor], where: Path) -> dict[str, str]:
    together(lambda: save_in_background(content, where / SHARDS).result())
    return _merged(_own_sums(where))


def _own_sums(where: Path) -> dict[str, str]:
    """SHA-256 of the shards that this process has written."""
    own = sorted((where / SHARDS).glob(f"__{rank()}_*"))
    return {f"{SHARDS}/{path.name}": sha256_of_file(path) for path in own}


def _merged(sums: dict[str, str]) -> dict[str, str]:
    return {file: each for of_rank in gather_objects(sums) for file, each in of_rank.items()}
