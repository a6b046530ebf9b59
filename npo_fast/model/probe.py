"""A handful of tokens through a model that was just loaded: is it one that this package knows?"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from npo_fast.data import PackedBatch, TokenizedExample, pack
from npo_fast.data.packing import one_by_one
from npo_fast.errors import UserError
from npo_fast.ops import linear_log_probs

if TYPE_CHECKING:
    from npo_fast.model.causal_lm import CausalLM

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}  # nats
# Half precision: of the head alone; and of a deep model, whose rounding differs from one shape to
# another by more (seen: 0.74, SmolLM2-135M fine-tuned; 1.4, 16 random layers on a CPU without
# instructions for bf16). What a neighbour changes at one shape is no rounding.
HALF_TOLERANCE, HALF_SHAPES, HALF_NEIGHBOUR = 0.25, 2.0, 0.05


@torch.no_grad()
def run_probe(lm: "CausalLM", any_attention: bool) -> None:
    """Compares log-probs of the model's own forward with those of our head, attention and packs.

    An attention that does not do is exchanged for the next that may where ``any_attention`` will
    do, at last for the model's own, and where packs are not kept apart ``lm.packs`` becomes false;
    both with a warning.

    Raises:
        UserError: the model does not run, or its head or attention is none that we know.
    """
    was_training = lm.model.training
    lm.model.eval()
    try:
        _probe(lm, any_attention)
    except (AttributeError, NotImplementedError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{lm.name} does not run here: {error}") from error
    finally:
        lm.model.train(was_training)


def _probe(lm: "CausalLM", any_attention: bool) -> None:
    tokens = [int(token) for token in torch.linspace(1, lm.vocabulary - 1, 19)]
    batch = _pack_of_two(lm, tokens[:7], tokens[7:])
    singles = list(one_by_one(batch))
    with lm.generating() as model:
        expected = torch.cat([_whole_log_probs(model, one) for one in singles])
        found = torch.cat([_head_log_probs(lm, one) for one in singles])
    gap = _gap(found, expected)
    if not gap <= TOLERANCE.get(lm.dtype, HALF_TOLERANCE):
        raise UserError(
            f"{lm.name}: its logits are not what its LM head makes of the decoder's hidden states "
            f"(log-probs differ by {gap:.3g} nats); a softcap, scale or projection that npo_fast "
            "does not know would explain it"
        )
    if not lm.packs:
        return
    while (
        any_attention
        and lm.attention != lm.native_attention
        and not _attends(lm, singles, expected)
    ):
        refused = lm.attention
        lm.unfit.add(refused)
        lm.choose_attention("auto")
        does = "keeps" if lm.attention == lm.native_attention else "takes"
        warnings.warn(
            f"{lm.name} does not run with {refused}: it {does} {lm.attention}", stacklevel=5
        )
    other = _pack_of_two(lm, tokens[-7:], tokens[7:])
    if why := _mixes(lm, batch, other, singles, expected):
        lm.packs = False
        warnings.warn(
            f"{lm.name} mixes the sequences of a pack ({why} with {lm.attention}): sequences run "
            "one at a time",
            stacklevel=5,
        )


def _pack_of_two(lm: "CausalLM", first: list[int], second: list[int]) -> PackedBatch:
    sequences = [TokenizedExample(tuple(first), 1, 0), TokenizedExample(tuple(second), 1, 1)]
    (batch,) = pack(sequences, max_tokens=len(first) + len(second))
    assert batch.indices == (0, 1)
    return batch.to(lm.device)


def _attends(lm: "CausalLM", singles: Sequence[PackedBatch], expected: Tensor) -> bool:
    """Whether single sequences have the log-probs that the model's own attention gives them."""
    try:
        gap = _gap(_log_probs(lm, singles), expected)
    except NotImplementedError:
        return False
    except TypeError:  # a decoder that does not take position_ids, whatever the attention
        return True
    return gap <= TOLERANCE.get(lm.dtype, HALF_SHAPES)


def _mixes(
    lm: "CausalLM",
    batch: PackedBatch,
    other: PackedBatch,  # the second sequence has another before it, as long
    singles: Sequence[PackedBatch],
    expected: Tensor,
) -> str:
    """In which way a pack is not its sequences alone; empty where it is.

    Raises:
        UserError: not even the sequences alone have the log-probs that are expected.
    """
    try:
        alone = _log_probs(lm, singles)
        packed, beside_another = lm.log_probs(batch), lm.log_probs(other)
    except TypeError:
        return "it takes no position_ids"
    shapes = TOLERANCE.get(lm.dtype, HALF_SHAPES)
    if not (gap := _gap(alone, expected)) <= shapes:
        raise UserError(
            f"{lm.name}: its log-probs with the attention {lm.attention} differ from its own by "
            f"{gap:.3g} nats: name another --attention"
        )
    if not (gap := _gap(packed, alone)) <= shapes:
        return f"log-probs differ by {gap:.3g} nats"
    second = slice(int(batch.answer_cu_seqlens[1]), None)
    gap = _gap(packed[second], beside_another[second])
    if not gap <= TOLERANCE.get(lm.dtype, HALF_NEIGHBOUR):
        return f"another neighbour changes log-probs by {gap:.3g} nats"
    return ""


def _log_probs(lm: "CausalLM", singles: Sequence[PackedBatch]) -> Tensor:
    return torch.cat([lm.log_probs(one) for one in singles])


def _head_log_probs(lm: "CausalLM", one: PackedBatch) -> Tensor:
    hidden = lm.decoder(input_ids=one.input_ids[None], use_cache=False).last_hidden_state[0]
    return linear_log_probs(hidden[one.rows], labels=one.labels, **lm.head_arguments)


def _whole_log_probs(model: Any, one: PackedBatch) -> Tensor:
    logits = model(input_ids=one.input_ids[None], use_cache=False).logits[0]
    log_probs = logits[one.rows].float().log_softmax(-1)
    return log_probs.gather(1, one.labels[:, None]).squeeze(1)


def _gap(found: Tensor, expected: Tensor) -> float:
    gap = float((found - expected).abs().max())
    return float("inf") if gap != gap else gap
