"""A test of a loaded model on a handful of tokens: whether this package can train it."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from npo_fast.data import PackedBatch, TokenizedExample, pack
from npo_fast.data.packing import one_by_one
from npo_fast.errors import UserError, first_line
from npo_fast.model.head_transform import check_vocabulary

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}  # nats
# In half precision: of the head alone; of a deep model at two shapes, between which rounding
# differs by more (measured: 0.74, SmolLM2-135M fine-tuned; 1.4, 16 random layers on a CPU without
# bf16 instructions); and of a sequence beside another neighbour, at shapes that round alike.
HALF_TOLERANCE, HALF_SHAPES, HALF_NEIGHBOUR = 0.25, 2.0, 0.05


@torch.no_grad()
def run_probe(lm: Any, any_attention: bool) -> None:
    """Compares log-probs of the model's own forward with those of our head, attention and packs.

    With ``any_attention`` an attention that gives other log-probs is exchanged for the next, in the
    end for the model's own. Where a pack is not its sequences alone, ``packs`` of the ``CausalLM``
    becomes false. Both come with a warning.

    Raises:
        UserError: the model does not run, or its head or attention is not understood.
    """
    with runs(lm), lm.evaluating():
        _probe(lm, any_attention)


@contextmanager
def runs(lm: Any) -> Iterator[None]:
    """Raises ``UserError`` where the model does not run inside."""
    try:
        yield
    except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, (UserError, torch.OutOfMemoryError)):
            raise
        raise UserError(f"{lm.name} does not run here: {first_line(error)}") from error


def _probe(lm: Any, any_attention: bool) -> None:
    tokens = [int(token) for token in torch.linspace(1, lm.vocabulary - 1, 19)]
    batch = _pack_of_two(lm, tokens[:7], tokens[7:])
    singles = list(one_by_one(batch))
    with lm.generating() as model:
        expected = torch.cat([_own_log_probs(model, single) for single in singles])
        check_vocabulary(lm)
    if not lm.packs:
        return
    beside_another = _pack_of_two(lm, tokens[-7:], tokens[7:])
    try:
        alone = _log_probs_alone(lm, singles, expected, any_attention)
        why = _difference_of_packs(lm, batch, beside_another, alone)
    except TypeError:  # whatever the attention
        why = "it takes no position_ids"
    if why:
        lm.packs = False
        warnings.warn(
            f"{lm.name} mixes the sequences of a pack ({why} with {lm.attention}): sequences run "
            "one at a time",
            stacklevel=5,
        )


def _pack_of_two(lm: Any, first: list[int], second: list[int]) -> PackedBatch:
    sequences = [TokenizedExample(tuple(ids), 1, i) for i, ids in enumerate((first, second))]
    (batch,) = pack(sequences, max_tokens=len(first) + len(second))
    assert batch.indices == (0, 1)
    return batch.to(lm.device)


def _log_probs_alone(
    lm: Any, singles: Sequence[PackedBatch], expected: Tensor, any_attention: bool
) -> Tensor:
    """Log-probs of single sequences, with an attention that makes them as ``expected``."""
    while True:
        is_last = not any_attention or lm.attention == lm.native_attention
        try:
            alone = torch.cat([lm.log_probs(single) for single in singles])
            if (gap := _gap(alone, expected)) <= TOLERANCE.get(lm.dtype, HALF_SHAPES):
                return alone
        except NotImplementedError:
            if is_last:
                raise
        if is_last:
            raise UserError(
                f"{lm.name}: its log-probs with the attention {lm.attention} differ from its own "
                f"by {gap:.3g} nats: name another --attention"
            )
        refused = lm.attention
        lm.unfit.add(refused)
        lm.choose_attention("auto")
        does = "keeps" if lm.attention == lm.native_attention else "takes"
        warnings.warn(
            f"{lm.name} does not run with {refused}: it {does} {lm.attention}", stacklevel=6
        )


def _difference_of_packs(lm: Any, batch: PackedBatch, other: PackedBatch, alone: Tensor) -> str:
    """How a pack differs from its sequences ``alone``; empty where it does not.

    In ``other`` a sequence of the same length stands before the second sequence.
    """
    packed, beside_another = lm.log_probs(batch), lm.log_probs(other)
    if (gap := _gap(packed, alone)) > TOLERANCE.get(lm.dtype, HALF_SHAPES):
        return f"log-probs differ by {gap:.3g} nats"
    second = slice(int(batch.answer_cu_seqlens[1]), None)
    gap = _gap(packed[second], beside_another[second])
    if gap > TOLERANCE.get(lm.dtype, HALF_NEIGHBOUR):
        return f"another neighbour changes log-probs by {gap:.3g} nats"
    return ""


def _own_log_probs(model: Any, single: PackedBatch) -> Tensor:
    """Of the model's own logits."""
    logits = model(input_ids=single.input_ids[None], use_cache=False).logits[0]
    log_probs = logits[single.rows].float().log_softmax(-1)
    return log_probs.gather(1, single.labels[:, None]).squeeze(1)


def _gap(log_probs: Tensor, expected: Tensor) -> float:
    """The largest difference in nats; infinite where one is NaN."""
    gap = float((log_probs - expected).abs().max())
    return float("inf") if gap != gap else gap
