"""The reference's hidden states on disk: what KL needs of a model that is no longer in memory.

reference.json               what it was made from, and the size and SHA-256 of every other file
head.safetensors             weight (V, D) and bias (V,)
<source>-00000.safetensors   hidden (n, D): sequences end to end, one file after another

Written a shard at a time and read through a memory map, so that neither needs room for all of it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from npo_fast.data import TokenizedExample, data_fingerprint, pack
from npo_fast.errors import UserError
from npo_fast.kernels.transform import HeadTransform
from npo_fast.losses import KL
from npo_fast.methods import Positions, Term
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.save import save_folder

FORMAT = 1
SHARD_BYTES = 256 << 20
INDEX, HEAD = "reference.json", "head.safetensors"
LOCK = "in-use"


class ReferenceCache:
    """Hidden states by source and sequence, and the head, of the model that it was made with."""

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        device: torch.device,
        owned: "OwnFolder | None" = None,  # goes with this object
    ) -> None:
        self.owned = owned
        self.made_from: Mapping[str, Any] = facts["made_from"]
        self.positions: Positions = self.made_from["positions"]
        self.device = device
        head = load_file(folder / HEAD, device=str(device))
        self.head_arguments = {
            "ref_weight": head["weight"],
            "ref_bias": head.get("bias"),
            **{f"ref_{name}": facts[name] for name in HeadTransform._fields},
        }
        self._shards = {
            source: [
                (
                    safe_open(folder / shard["file"], framework="pt"),
                    list(accumulate(shard["lengths"], initial=0)),
                )
                for shard in shards
            ]
            for source, shards in facts["sources"].items()
        }
        self._firsts = {
            source: list(accumulate((len(bounds) - 1 for _, bounds in shards), initial=0))
            for source, shards in self._shards.items()
        }

    def hidden(self, source: str, indices: Iterable[int]) -> Tensor:  # (n, D)
        """The rows of these sequences of ``source``, one after another."""
        rows = [self._rows(source, index) for index in indices]
        return torch.cat(rows).to(self.device, non_blocking=True)

    def _rows(self, source: str, index: int) -> Tensor:
        at = bisect_right(self._firsts[source], index) - 1
        file, bounds = self._shards[source][at]
        within = index - self._firsts[source][at]
        return file.get_slice("hidden")[bounds[within] : bounds[within + 1]]


def reference_cache_for(
    terms: tuple[Term, ...],
    lm: CausalLM,
    sources: Mapping[str, list[TokenizedExample]],
    micro_batch_tokens: int,
    folder: Path | None = None,
) -> ReferenceCache | None:
    """The ``reference_cache`` that these terms need, or None."""
    compared = [term for term in terms if isinstance(term.loss, KL)]
    if not compared:
        return None
    (positions,) = {term.positions for term in compared}
    own: dict[str, list[TokenizedExample]] = {
        term.source: sources[term.source] for term in compared
    }
    return reference_cache(lm, own, folder, positions, micro_batch_tokens)


def reference_cache(
    lm: CausalLM,
    sources: Mapping[str, list[TokenizedExample]],
    folder: Path | None,
    positions: Positions,
    micro_batch_tokens: int,
) -> ReferenceCache:
    """Opens the cache in ``folder``, or makes it with the model as it is now where there is none.

    Args:
        sources: tokenised data by source; a sequence is found by its place in the list.
        folder: None makes one among the temporary files, for as long as the object lives.
        positions: the rows to keep, those that predict an "answer" token or "all" of them.
        micro_batch_tokens: tokens that go through the model at a time.

    Raises:
        UserError: the folder holds something else, or a cache that is damaged or was made from
            another model, other data or other positions; or the model's states are not finite.
    """
    owned = None
    if folder is None:
        owned = OwnFolder()
        folder = owned.path / "reference"
    made_from = fingerprint(lm, sources, positions)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent):  # another run may be making the same one
            if not folder.exists():
                save_folder(
                    folder, lambda where: _write(lm, sources, where, made_from, micro_batch_tokens)
                )
    return ReferenceCache(folder, _checked_facts(folder, made_from), lm.device, owned)


class OwnFolder:
    """A temporary folder for as long as the object lives.

    A process that is killed leaves its own behind, which may be large: the next one removes it. A
    lock, which ends with its process, tells which are in use.
    """

    PREFIX = "npo-fast-reference-"

    def __init__(self) -> None:
        with locked(Path(gettempdir())):  # a new folder without its lock is not an abandoned one
            self._remove_abandoned()
            self._folder = TemporaryDirectory(prefix=self.PREFIX)
            self.path = Path(self._folder.name)
            self._lock = (self.path / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def _remove_abandoned(self) -> None:
        for lock in Path(gettempdir()).glob(f"{self.PREFIX}*/{LOCK}"):
            with suppress(OSError), lock.open("a") as file:  # in use, or another user's
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time is inside for this folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def fingerprint(
    lm: CausalLM, sources: Mapping[str, list[TokenizedExample]], positions: Positions
) -> dict[str, Any]:
    """All that the hidden states depend on; the token ids stand for template and tokenizer."""
    return {
        "model": model_fingerprint(lm.model),
        "positions": positions,
        "data": {source: data_fingerprint(sequences) for source, sequences in sources.items()},
    }


def model_fingerprint(model: Any) -> str:
    """SHA-256 over the weights with names, dtypes and shapes, and what the config departs in."""
    digest = hashlib.sha256()
    config = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if not name.startswith("_") and name != "transformers_version"
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(
    lm: CausalLM,
    sources: Mapping[str, list[TokenizedExample]],
    folder: Path,
    made_from: Mapping[str, Any],
    micro_batch_tokens: int,
) -> None:
    head = {name: lm.head_arguments[name] for name in ("weight", "bias")}
    save_file(
        {name: t.detach().contiguous() for name, t in head.items() if t is not None}, folder / HEAD
    )
    everywhere = made_from["positions"] == "all"
    shards: dict[str, list[dict[str, Any]]] = {}
    for source, sequences in sources.items():
        shards[source] = []
        for states in _shards(_states(lm, source, sequences, everywhere, micro_batch_tokens)):
            file = f"{source}-{len(shards[source]):05d}.safetensors"
            save_file({"hidden": torch.cat(states)}, folder / file)
            shards[source].append({"file": file, "lengths": [len(one) for one in states]})
    facts = {
        "format": FORMAT,
        "made_from": made_from,
        **lm.transform._asdict(),
        "sources": shards,
        "sha256": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / INDEX).write_text(json.dumps(facts), encoding="utf-8")


@torch.no_grad()
def _states(
    lm: CausalLM,
    source: str,
    sequences: list[TokenizedExample],
    everywhere: bool,
    micro_batch_tokens: int,
) -> Iterator[Tensor]:  # (n, D) a sequence, in the order given
    was_training = lm.model.training
    lm.model.eval()
    try:
        for batch in pack(sequences, micro_batch_tokens):
            states = lm.states(batch.to(lm.device))
            if not everywhere:
                states = states[batch.rows.to(lm.device)]
            if not bool(states.isfinite().all()):
                records = ", ".join(str(index + 1) for index in sorted(batch.indices)[:8])
                raise UserError(
                    f"{source} records {records}: the hidden states of the reference are not "
                    "finite; load it with --dtype bf16 or fp32, or check its weights"
                )
            lengths = batch.lengths if everywhere else batch.answer_cu_seqlens.diff().tolist()
            parts = states.cpu().split(list(lengths))
            yield from (parts[i] for i in sorted(range(len(parts)), key=batch.indices.__getitem__))
    finally:
        lm.model.train(was_training)


def _shards(states: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    size = 0
    for one in states:
        shard.append(one)
        size += one.nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _checked_facts(folder: Path, made_from: Mapping[str, Any]) -> dict[str, Any]:
    cure = "delete the folder or name another one, and it is made anew"
    try:
        facts: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise UserError(
                f"{folder / INDEX} has the format {facts['format']}, not {FORMAT}; {cure}"
            )
        found, files = facts["made_from"], facts["sha256"]
        other = [name for name in made_from if found.get(name) != made_from[name]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder / INDEX} is not there or not a reference cache's ({error}); {cure}"
        ) from error
    if other:
        raise UserError(
            f"the reference cache {folder} was made with another {' and other '.join(other)} than "
            f"this run's; {cure}"
        )
    for name, sha256 in files.items():
        try:
            intact = _sha256(folder / name) == sha256
        except OSError as error:
            raise UserError(f"cannot read {folder / name} ({error}); {cure}") from error
        if not intact:
            raise UserError(f"{folder / name} is damaged (its SHA-256 has changed); {cure}")
    return facts


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
