"""Log-probs of a reference model: computed once, or read from a folder that runs share.

A reference cache (``--reference-cache``) holds

states                  hidden states and the head, for a KL (``reference_states``)
states-layer-7          hidden states of that decoder layer, for RMU
log_probs-<source>      reference.json: what the log-probs were made from, and their SHA-256
                        log_probs.safetensors: of tokens (N,) and of sequences (S,), lengths (S,)

Each is complete or absent, so that methods which compare with the same answers share them. Of
several processes each has its own in a folder rank-0-of-2, rank-1-of-2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npo_fast.data import Sources, TokenizedExample, data_fingerprint
from npo_fast.errors import UserError, reading
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.manifest import write_manifest
from npo_fast.model.reference_states import (
    FORMAT,
    INDEX,
    RANK,
    REMEDY,
    cache_of,
    open_folder,
    reference_fingerprint,
)
from npo_fast.ops import segment_sum

STATES, LOG_PROBS = "states", "log_probs-"
FILE = "log_probs.safetensors"


def states_name(layer: int | None) -> str:
    """The folder of hidden states in a cache: the last ones, or those of a decoder layer."""
    return STATES if layer is None else f"{STATES}-layer-{layer}"


class ReferenceLogProbs(NamedTuple):
    """Log-probs of S sequences of a source under the reference, on the CPU."""

    tokens: list[Tensor]  # S, (n,)
    sequences: Tensor  # (S,)


def reference_log_probs_of(
    lm: CausalLM, sources: Sources, micro_batch_tokens: int, cache: Path | None = None
) -> dict[str, ReferenceLogProbs]:
    """Log-probs of each source under the model as it is now, kept in ``cache`` and read from it.

    Raises:
        UserError: log-probs in ``cache`` that are damaged or were made from another model, head or
            data; or ones to be kept that are not finite.
    """
    if cache is None:
        return {name: _compute(lm, rows, micro_batch_tokens) for name, rows in sources.items()}
    check_cache(cache)
    made_from = reference_fingerprint(lm) if sources else {}
    cache = cache_of(lm, cache)
    return {
        name: _shared(lm, name, rows, micro_batch_tokens, cache / f"{LOG_PROBS}{name}", made_from)
        for name, rows in sources.items()
    }


def check_cache(folder: Path) -> None:
    """Raises ``UserError`` where ``folder`` holds something that is no reference cache."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--reference-cache {folder} is a file; name a folder")
    names = [path.name for path in folder.iterdir()]
    if INDEX in names:
        raise UserError(
            f"the reference cache {folder} is of an earlier version; delete the folder or name "
            "another --reference-cache, and it is made anew"
        )
    if names and not any(name.startswith((STATES, LOG_PROBS, RANK)) for name in names):
        raise UserError(
            f"{folder} is not empty and holds no reference cache; name another --reference-cache"
        )


@torch.no_grad()
def _compute(
    lm: CausalLM, sequences: list[TokenizedExample], micro_batch_tokens: int
) -> ReferenceLogProbs:
    tokens, sums = ([torch.empty(0)] * len(sequences) for _ in range(2))
    with lm.evaluating():
        for batch in lm.micro_batches(sequences, micro_batch_tokens):
            log_probs = lm.log_probs(batch)
            # as a training step adds them up, so that its ratios begin at 0 exactly
            of_sequences = segment_sum(log_probs, batch.answer_cu_seqlens).cpu()
            of_tokens = log_probs.cpu().split(batch.answer_cu_seqlens.diff().tolist())
            for i, part, log_prob in zip(batch.indices, of_tokens, of_sequences, strict=True):
                tokens[i], sums[i] = part, log_prob
    return ReferenceLogProbs(tokens, torch.stack(sums))


def _shared(
    lm: CausalLM,
    source: str,
    sequences: list[TokenizedExample],
    micro_batch_tokens: int,
    folder: Path,
    made_from: Mapping[str, object],
) -> ReferenceLogProbs:
    made_from = {**made_from, "data": data_fingerprint(sequences)}

    def write(path: Path) -> None:
        found = _compute(lm, sequences, micro_batch_tokens)
        if not bool(found.sequences.isfinite().all()):
            records = (~found.sequences.isfinite()).nonzero().flatten()[:8] + 1
            raise UserError(
                f"{source} records {', '.join(map(str, records.tolist()))}: the log-probs of the "
                "reference are not finite; load it with --dtype bf16 or fp32, or check its weights"
            )
        lengths = torch.tensor([len(part) for part in found.tokens])
        content = {"tokens": torch.cat(found.tokens), "sequences": found.sequences}
        save_file({**content, "lengths": lengths}, path / FILE)
        write_manifest(path, INDEX, format=FORMAT, made_from=made_from)

    open_folder(lm, folder, made_from, write)
    with reading(f"the reference cache {folder}", REMEDY):
        kept = load_file(folder / FILE)
        return ReferenceLogProbs(
            list(kept["tokens"].split(kept["lengths"].tolist())), kept["sequences"]
        )
