"""Hidden states of a reference model on disk: a KL or RMU needs no second model in memory.

A folder holds

reference.json               what the states were made from; a manifest of the other files
head.safetensors             weight (V, D) and bias (V,); not beside the states of a layer
<source>-00000.safetensors   hidden (n, D): sequences end to end, one file after another

It is written a file at a time and read through a memory map: neither holds all of it in memory.
Each of several processes that share a model has a folder of its own, with its part of the sequences
and its slice of the head; what a step needs is gathered.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import accumulate, pairwise
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Literal, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from npo_fast.boundary import check_folder, read_json
from npo_fast.data import Sources, TokenizedExample, data_fingerprint
from npo_fast.distributed import full, gather_objects
from npo_fast.errors import UserError, reading
from npo_fast.kernels.transform import HeadTransform
from npo_fast.locks import CAN_LOCK, lock, locked
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.manifest import DamagedError, check_files, unsealed, write_manifest
from npo_fast.model.save import save_folder
from npo_fast.ops.checks import WITH_AUTOCAST
from npo_fast.ops.vocab_parallel import VocabularySlice, gather_rows, local_head

FORMAT = 2
SHARD_BYTES = 256 << 20
INDEX, HEAD = "reference.json", "head.safetensors"
RANK = "rank-"  # begins the folder of one of several processes in a cache
LOCK = "in-use"


class ReferenceStates:
    """Hidden states of a reference model by source and sequence, and its head."""

    def __init__(
        self,
        folder: Path,
        index: Mapping[str, Any],  # content of reference.json
        device: torch.device,
        temporary: "TemporaryFolder | None" = None,  # removed with this object
        vocabulary: VocabularySlice | None = None,  # of the model that processes share
    ) -> None:
        self.temporary = temporary
        self.made_from: Mapping[str, Any] = index["made_from"]
        self.device, self.vocabulary = device, vocabulary
        self._places: dict[str, dict[int, tuple[Any, slice]]] = {}  # file and rows of sequences
        self._rows: list[dict[str, dict[int, int]]] = [{}]  # by process, source and sequence
        with reading(f"the reference cache {folder}", REMEDY):
            if "layer" not in self.made_from:
                tensors = load_file(folder / HEAD, device=str(device))
                known = {n: index[n] for n in HeadTransform._fields if n in index}
                transform = HeadTransform(**known)
                self.head = local_head(
                    tensors["weight"], tensors.get("bias"), transform, vocabulary
                )
            for source, shards in index["sources"].items():
                places = self._places[source] = {}
                for shard in shards:
                    file = safe_open(folder / shard["file"], framework="pt")
                    bounds = pairwise(accumulate(shard["lengths"], initial=0))
                    first = len(places)
                    records = shard.get("records", range(first, first + len(shard["lengths"])))
                    places |= {i: (file, slice(*b)) for i, b in zip(records, bounds, strict=True)}
        if vocabulary is not None:
            own = {
                source: {i: rows.stop - rows.start for i, (_, rows) in places.items()}
                for source, places in self._places.items()
            }
            self._rows = gather_objects(own, vocabulary.group)
            every = (place for places in self._places.values() for place in places.values())
            found = next((file.get_slice("hidden")[:0] for file, _ in every), None)
            self._none = next(e for e in gather_objects(found, vocabulary.group) if e is not None)

    @property
    def head_arguments(self) -> dict[str, Any]:
        """The head as ``linear_kl`` takes it: ``ref_weight``, ``ref_bias`` and so on."""
        head = self.head
        arguments = {"weight": head.weight, "bias": head.bias, **head.transform._asdict()}
        return {f"ref_{name}": value for name, value in arguments.items()}

    def hidden(self, source: str, indices: Iterable[int]) -> Tensor:  # (n, D)
        """Returns the rows of these sequences of ``source``, end to end, on ``device``."""
        indices, places = list(indices), self._places[source]
        distinct = [*dict.fromkeys(indices)]  # a small retain set may be there twice
        with reading("the reference cache", REMEDY):
            own = [places[index] for index in distinct if index in places]
            rows = [file.get_slice("hidden")[part] for file, part in own]
        if self.vocabulary is None:
            states = dict(zip(distinct, rows, strict=True))
        else:
            states = self._gathered(source, distinct, rows)
        return torch.cat([states[i] for i in indices]).to(self.device, non_blocking=True)

    def _gathered(
        self, source: str, indices: list[int], own: list[Tensor]
    ) -> dict[int, Tensor]:  # distinct sequences; own (n, D) each
        """Returns the rows of all processes, by sequence."""
        assert self.vocabulary is not None
        of_ranks = [
            {i: rows[source][i] for i in indices if i in rows[source]} for rows in self._rows
        ]
        counts = [sum(rows.values()) for rows in of_ranks]
        local = torch.cat([self._none, *own]).to(self.device)
        gathered = gather_rows(local, counts, self.vocabulary.group)
        order = [index for rows in of_ranks for index in rows]
        lengths = [length for rows in of_ranks for length in rows.values()]
        return dict(zip(order, gathered.split(lengths), strict=True))


def open_reference_states(
    lm: CausalLM,
    sources: Sources,
    folder: Path | None,
    positions: Literal["answer", "all"],
    micro_batch_tokens: int,
    layer: int | None = None,
) -> ReferenceStates:
    """Opens the states in ``folder``; where it does not exist, computes them with ``lm`` first.

    Args:
        lm: the reference, with the weights it has now.
        sources: tokenised data by source; a sequence is addressed by its place in the list.
        folder: None makes a temporary one, removed together with the object.
        positions: the rows to keep, those that predict an "answer" token or "all" of them.
        micro_batch_tokens: tokens that go through the model at a time.
        layer: keeps what this decoder layer hands on, without the head; "answer" positions are
            those of the answers' own tokens then.

    Raises:
        UserError: the folder holds something else, or states that are damaged or were made from
            another model, head, data or positions; or the model's states are not finite.
    """
    temporary = None
    if folder is None:
        temporary = TemporaryFolder()
        folder = temporary.path / "reference"
    made_from = {  # token ids stand for template and tokenizer
        **reference_fingerprint(lm),
        "positions": positions,
        **({} if layer is None else {"layer": layer}),
        "data": {source: data_fingerprint(sequences) for source, sequences in sources.items()},
    }
    index = open_folder(
        lm, folder, made_from, lambda path: _write(lm, sources, path, made_from, micro_batch_tokens)
    )
    return ReferenceStates(folder, index, lm.device, temporary, lm.vocabulary_slice)


def open_folder(
    lm: CausalLM, folder: Path, made_from: Mapping[str, Any], write: Callable[[Path], None]
) -> dict[str, Any]:
    """The content of ``reference.json``; where there is no folder, ``write`` fills it first.

    Where one of several processes that share the model lacks its folder, all write theirs.

    Raises:
        UserError: the folder holds something else, is damaged, or was made from something else.
    """
    if lm.all_reduce_max(int(not folder.exists())):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent):  # another run may be making the same
            if lm.all_reduce_max(int(not folder.exists())):
                save_folder(folder, write)
    return _checked_index(folder, made_from)


def cache_of(lm: CausalLM, cache: Path) -> Path:
    """The part of a reference cache that this process reads and writes."""
    return cache if lm.world_size == 1 else cache / f"{RANK}{lm.rank}-of-{lm.world_size}"


class TemporaryFolder:
    """A temporary folder that is removed together with the object.

    A killed process leaves its folder behind, which may be large: the next process removes it. A
    lock, which ends with its process, marks the folders in use.
    """

    PREFIX = "npo-fast-reference-"

    def __init__(self) -> None:
        parent = Path(gettempdir())
        with locked(parent):  # a new folder has no lock yet and looks abandoned
            for path in parent.glob(f"{self.PREFIX}*/{LOCK}") if CAN_LOCK else ():
                with suppress(OSError), path.open("a") as file:  # in use, or another user's
                    lock(file, wait=False)
                    shutil.rmtree(path.parent)
            self._folder = TemporaryDirectory(prefix=self.PREFIX)
            self.path = Path(self._folder.name)
            self._lock = (self.path / LOCK).open("w")
            lock(self._lock)


def reference_fingerprint(lm: CausalLM) -> dict[str, Any]:
    """What log-probs and states of the model depend on, beside the data."""
    device = lm.device.type
    autocast = device in WITH_AUTOCAST and torch.is_autocast_enabled(device)
    return {
        "model": model_fingerprint(lm.model),
        "head": [None if value is None else f"{value:.6g}" for value in lm.transform],
        "autocast": str(torch.get_autocast_dtype(device)) if autocast else None,
    }


def model_fingerprint(model: Any) -> str:
    """SHA-256 of the config's non-default values and of names, dtypes, shapes and weights.

    Processes that share a model gather one weight at a time, and all return the same.
    """
    digest = hashlib.sha256()
    config = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if not name.startswith("_") and name != "transformers_version"
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        whole: Any = full(tensor)
        digest.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(
    lm: CausalLM,
    sources: Sources,
    folder: Path,
    made_from: Mapping[str, Any],
    micro_batch_tokens: int,
) -> None:
    layer = made_from.get("layer")
    if layer is None:
        head = {name: lm.head_arguments[name] for name in ("weight", "bias")}  # or its slice
        tensors = {name: t.detach().contiguous() for name, t in head.items() if t is not None}
        save_file(tensors, folder / HEAD)
    everywhere = made_from["positions"] == "all"
    shards: dict[str, list[dict[str, Any]]] = {}
    for source, sequences in sources.items():
        shards[source] = []
        rows_of = _states(lm, source, sequences, everywhere, layer, micro_batch_tokens)
        for states in _shards(rows_of):
            file = f"{source}-{len(shards[source]):05d}.safetensors"
            save_file({"hidden": torch.cat([*states.values()])}, folder / file)
            shard: dict[str, Any] = {"file": file, "lengths": [len(r) for r in states.values()]}
            if lm.world_size > 1:
                shard["records"] = [*states]
            shards[source].append(shard)
    facts = {**lm.transform._asdict(), "sources": shards}
    write_manifest(folder, INDEX, format=FORMAT, made_from=made_from, **facts)


@torch.no_grad()
def _states(
    lm: CausalLM,
    source: str,
    sequences: list[TokenizedExample],
    everywhere: bool,
    layer: int | None,
    micro_batch_tokens: int,
) -> Iterator[tuple[int, Tensor]]:  # of each sequence its index, and (n, D)
    """Of one process in the order given; of several, those that this one runs."""
    with lm.evaluating():
        for batch in lm.micro_batches(sequences, micro_batch_tokens):
            places, offsets = batch.tokens(everywhere)
            if layer is None and not everywhere:
                places = batch.rows
            states = lm.states(batch, layer)[places]
            if lm.all_reduce_max(int(not bool(states.isfinite().all()))):
                records = ", ".join(str(index + 1) for index in sorted(batch.indices)[:8])
                raise UserError(
                    f"{source} records {records}: the hidden states of the reference are not "
                    "finite; load it with --dtype bf16 or fp32, or check its weights"
                )
            rows = states.cpu().split(offsets.diff().tolist())
            indices = (example.index for example in batch.own)
            yield from sorted(zip(indices, rows, strict=True), key=itemgetter(0))


def _shards(states: Iterable[tuple[int, Tensor]]) -> Iterator[dict[int, Tensor]]:
    shard: dict[int, Tensor] = {}
    size = 0
    for index, rows in states:
        shard[index] = rows
        size += rows.nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


_OF_TOKENS = (
    " (other records, or a template, system prompt or date that makes other tokens of them)"
)

REMEDY = "delete the folder or name another one, and it is made anew"


class _Index(TypedDict):
    """``reference.json``, as far as it is read before its files are checked."""

    format: int
    made_from: dict[str, Any]


def _checked_index(folder: Path, made_from: Mapping[str, Any]) -> dict[str, Any]:
    check_folder(folder)
    try:
        index: dict[str, Any] = read_json(folder / INDEX, _Index)
    except UserError as error:
        raise UserError(
            f"{folder / INDEX} is not there or not a reference cache's ({error}); {REMEDY}"
        ) from error
    if index["format"] != FORMAT:
        raise UserError(
            f"{folder / INDEX} has the format {index['format']}, not {FORMAT}; {REMEDY}"
        )
    try:
        earlier = unsealed(index, folder / INDEX)["made_from"]
    except DamagedError as error:
        raise UserError(f"{error}; {REMEDY}") from error
    differing = [name for name in made_from if earlier.get(name) != made_from[name]]
    if differing:
        raise UserError(
            f"the reference cache {folder} was made with another "
            f"{' and other '.join(differing)} than this run's"
            f"{_OF_TOKENS if 'data' in differing else ''}; {REMEDY}"
        )
    try:
        check_files(folder, index["files"], INDEX)
    except DamagedError as error:
        raise UserError(f"{error}; {REMEDY}") from error
    return index
