"""A handful of tokens through a model that was just loaded: is it one that this package knows?"""

import warnings
from collections.abc import Sequence as Several
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from npo_fast.data import PackedBatch, Sequence, pack
from npo_fast.data.packing import one_by_one
from npo_fast.errors import UserError
from npo_fast.ops import linear_log_probs

if TYPE_CHECKING:
    from npo_fast.model.causal_lm import CausalLM

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}  # nats
HALF_TOLERANCE = 0.25  # of half-precision weights
# There a pack may depart from its sequences alone as far as one attention does from another, times
# this, but not by more than the above, and by so many nats in any case.
NOISE_FACTOR, LEAST_NOISE = 4.0, 0.05


@torch.no_grad()
def run_probe(lm: "CausalLM", any_attention: bool) -> None:
    """Compares log-probs of the model's own forward with those of our head, attention and packs.

    An attention that does not do is exchanged for the model's own where ``any_attention`` will do,
    and where packs are not kept apart ``lm.packs`` becomes false; both with a warning.

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
    sequences = [Sequence(tuple(tokens[:7]), 1, 0), Sequence(tuple(tokens[7:]), 1, 1)]
    (batch,) = (one.to(lm.device) for one in pack(sequences, max_tokens=len(tokens)))
    singles = [one.to(lm.device) for one in one_by_one(batch)]
    tolerance = TOLERANCE.get(lm.dtype, HALF_TOLERANCE)
    with lm.generating() as model:
        expected = torch.cat([_whole_log_probs(model, one) for one in singles])
        found = torch.cat([_head_log_probs(lm, one) for one in singles])
    gap = _gap(found, expected)
    if not gap <= tolerance:
        raise UserError(
            f"{lm.name}: its logits are not what its LM head makes of the decoder's hidden states "
            f"(log-probs differ by {gap:.3g} nats); a softcap, scale or projection that npo_fast "
            "does not know would explain it"
        )
    if lm.packs and any_attention and lm.attention != lm.native_attention:
        try:
            unfit = _gap(_log_probs(lm, singles), expected) > tolerance
        except NotImplementedError:
            unfit = True
        except TypeError:  # see below
            unfit = False
        if unfit:
            warnings.warn(
                f"{lm.name} does not run with {lm.attention}: it keeps {lm.native_attention}",
                stacklevel=5,
            )
            lm.choose_attention(lm.native_attention)
    if lm.packs:
        gap, tolerance = _packing_gap(lm, batch, singles, expected, tolerance)
        if not gap <= tolerance:
            lm.packs = False
            warnings.warn(
                f"{lm.name} mixes the sequences of a pack (log-probs differ by {gap:.3g} nats with "
                f"{lm.attention}): sequences run one at a time",
                stacklevel=5,
            )


def _packing_gap(
    lm: "CausalLM",
    batch: PackedBatch,
    singles: Several[PackedBatch],
    expected: Tensor,
    tolerance: float,
) -> tuple[float, float]:
    """How far a pack is from its sequences alone, and how far it may be, in nats."""
    try:
        alone = _log_probs(lm, singles)
        packed = lm.log_probs(batch)
    except TypeError:  # a decoder that does not take position_ids
        return float("inf"), tolerance
    noise = _gap(alone, expected)
    if not noise <= tolerance:
        differs = (
            f"{lm.name}: its log-probs with the attention {lm.attention} differ from its own by "
            f"{noise:.3g} nats: name another --attention"
        )
        if lm.dtype in TOLERANCE:
            raise UserError(differs)
        warnings.warn(differs, stacklevel=6)  # half precision: a deep model may round so much
    if lm.dtype not in TOLERANCE:
        tolerance = min(tolerance, max(LEAST_NOISE, NOISE_FACTOR * noise))
    return _gap(packed, alone), tolerance


def _log_probs(lm: "CausalLM", singles: Several[PackedBatch]) -> Tensor:
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
