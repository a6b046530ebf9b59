"""What a model does to the raw logits of its LM head, measured on hidden states of known size.

    z = scale * softcap * tanh(a / softcap),    a = W h + b

Names of settings say little: one family divides by ``logits_scaling``, another multiplies. So the
model's own forward is run with its decoder's hidden states exchanged for random ones of several
sizes, and its head for a small random one, both in fp64: what comes out is the transform, whatever
the weights and their dtype are.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from npo_fast.errors import UserError, first_line
from npo_fast.kernels.transform import HeadTransform

# Powers of two: the least shows the slope at 0, the greatest (raw logits up to 4e4) every softcap
SCALES = (2**-10, 1, 32, 1024, 2**13)
ROWS_OF_SCALE, COLUMNS = 3, 256
TOLERANCE, HALF_TOLERANCE = 1e-5, 2**-6  # of the spread of the logits
EXACTNESS = {torch.float64: 1e-9, torch.float32: 1e-6}  # of a fit, by the dtype of the logits
DIGITS = 5  # of a number that someone wrote into a configuration, or of its inverse


@torch.no_grad()
def measure_transform(lm: Any) -> HeadTransform:
    """The transform that the model's own forward applies; the model is in evaluation mode.

    Raises:
        UserError: the logits are no scale and softcap of what the head makes of hidden states.
    """
    head = lm.head
    if head.weight.is_meta:  # shapes without values, as the planner has them
        return HeadTransform()
    if own := {name for name, _ in head.named_parameters()} - {"weight", "bias"}:
        raise _not_understood(lm, f"the head has {', '.join(sorted(own))} beside weight and bias")
    width = head.weight.shape[1]
    hidden, weight, bias = _random_head(width, head.weight.device)
    with _exchanged(head, weight, bias), torch.enable_grad():
        logits = logits_of(lm, hidden)
    if logits.requires_grad:
        raise _not_understood(lm, "a parameter that is trained takes part")
    if logits.shape != (len(hidden), COLUMNS):
        raise _not_understood(lm, f"{COLUMNS} raw logits become {logits.shape[-1]}")
    raw = hidden @ weight.T
    if getattr(head, "bias", None) is not None:
        raw += bias
    transform = _fit(raw, logits)
    tolerance = HALF_TOLERANCE if logits.dtype.itemsize < 4 else TOLERANCE
    for scale, got, expected in zip(
        SCALES, logits.double().chunk(len(SCALES)), transform.apply(raw).chunk(len(SCALES)),
        strict=True,
    ):  # fmt: skip
        gap = relative_gap(got, expected)
        if not gap <= tolerance:
            raise _not_understood(
                lm, f"at hidden states of size {scale:g} they differ by {gap:.2g} of their spread"
            )
    return transform


@torch.no_grad()
def check_all_logits(lm: Any) -> None:
    """Compares all logits of the model with those of its head, in the weights' own dtype.

    Raises:
        UserError: they differ, as where a model leaves tokens out.
    """
    rows, width = len(SCALES), lm.head.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(lm.device, lm.dtype)
    if lm.dtype != torch.float16:  # whose range is small
        hidden *= torch.tensor([1, 1, 32, 32, 1024]).to(hidden)[:, None]
    logits = logits_of(lm, hidden)
    if lm.vocabulary_slice is None:
        raw = nn.functional.linear(hidden, lm.head.weight, getattr(lm.head, "bias", None))
    else:
        raw = lm.head(hidden)
    if logits.shape != raw.shape:
        raise _not_understood(lm, f"{raw.shape[-1]} raw logits become {logits.shape[-1]}")
    tolerance = 2 * HALF_TOLERANCE if lm.dtype.itemsize < 4 else 10 * TOLERANCE
    for got, expected in zip(logits.float(), lm.transform.apply(raw.float()), strict=True):
        if not (gap := relative_gap(got, expected)) <= tolerance:
            raise _not_understood(lm, f"of some token they differ by {gap:.2g} of their spread")


def logits_of(lm: Any, hidden: Tensor) -> Tensor:  # (n, D) -> (n, V)
    """The logits that the model's own forward makes where its decoder gives ``hidden``.

    Raises:
        UserError: the forward does not run on them.
    """
    exchanged = []

    def exchange(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        states = out[0] if isinstance(out, tuple) else out.last_hidden_state
        if states.shape != (1, *hidden.shape):
            raise _not_understood(
                lm,
                f"the decoder makes hidden states of {tuple(states.shape)}, not of "
                f"{(1, *hidden.shape)}",
            )
        exchanged.append(out)
        if isinstance(out, tuple):
            return (hidden[None], *out[1:])
        out.last_hidden_state = hidden[None]
        return out

    ids = torch.arange(1, len(hidden) + 1, device=hidden.device)[None] % lm.vocabulary
    with lm.decoder.register_forward_hook(exchange):
        try:
            logits = lm.model(input_ids=ids, use_cache=False).logits
        except (RuntimeError, IndexError) as error:
            if not exchanged:
                raise
            between = _layers_between(lm)
            why = f"{between[0]} lies between" if between else first_line(error)
            raise _not_understood(lm, why) from error
    if not exchanged:
        raise _not_understood(lm, "its forward does not call its decoder")
    return logits.squeeze(0) if logits.dim() > 2 else logits


def relative_gap(got: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the spread of what is expected."""
    spread = expected.std().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((got - expected).abs().max() / spread)


def _layers_between(lm: Any) -> list[str]:
    """Names of modules with weights that are neither in the decoder nor the head."""
    known = {*lm.decoder.modules(), *lm.head.modules()}
    return [
        name
        for name, module in lm.model.named_modules()
        if module not in known and next(module.parameters(recurse=False), None) is not None
    ]


def _random_head(width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of all ``SCALES``, a weight and a bias, such that logits are as large."""
    generator = torch.Generator().manual_seed(0)
    # on an Apple GPU there is no fp64
    dtype = torch.float32 if device.type == "mps" else torch.float64

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).to(device)

    scales = torch.tensor(SCALES, dtype=dtype).repeat_interleave(ROWS_OF_SCALE)[:, None]
    hidden = random(len(scales), width) * scales.to(device)
    return hidden, random(COLUMNS, width) * width**-0.5, random(COLUMNS) * SCALES[0]


@contextmanager
def _exchanged(head: nn.Module, weight: Tensor, bias: Tensor) -> Iterator[None]:
    """Inside, the head has these weights; an embedding that is tied to it keeps its own."""
    new = {"weight": weight, "bias": bias}
    kept = {name: p for name in new if (p := getattr(head, name, None)) is not None}
    for name in kept:
        setattr(head, name, nn.Parameter(new[name], requires_grad=False))
    try:
        yield
    finally:
        for name, parameter in kept.items():
            setattr(head, name, parameter)


def _fit(raw: Tensor, logits: Tensor) -> HeadTransform:  # (n, V) each
    """The scale and softcap that explain the logits best."""
    exactness = EXACTNESS.get(logits.dtype, HALF_TOLERANCE)
    logits = logits.to(raw.dtype)
    least, greatest = raw[:ROWS_OF_SCALE], raw.abs().argmax()
    slope = _slope(least, logits[:ROWS_OF_SCALE])
    largest, capped = raw.flatten()[greatest].item(), logits.flatten()[greatest].item()
    softcap = None
    for _ in range(3):  # each makes the other more exact
        ratio = capped / (slope * largest) if slope else 1.0
        is_capped = 0 < ratio < 1 - 10 * exactness
        softcap = abs(largest) / _inverse_of_tanh_ratio(ratio) if is_capped else None
        slope = _slope(HeadTransform(softcap).apply(least), logits[:ROWS_OF_SCALE])
    scale = _as_written(slope, exactness)
    return HeadTransform(None if softcap is None else _as_written(softcap, exactness), scale)


def _slope(raw: Tensor, logits: Tensor) -> float:
    return float((raw * logits).sum() / raw.square().sum())


def _inverse_of_tanh_ratio(ratio: float) -> float:
    """The x > 0 with ``tanh(x) / x = ratio``, by bisection."""
    low, high = 0.0, 1.0 / ratio
    for _ in range(100):
        middle = (low + high) / 2
        above = torch.tensor(middle, dtype=torch.float64).tanh().item() > ratio * middle
        low, high = (middle, high) if above else (low, middle)
    return high


def _as_written(value: float, exactness: float) -> float:
    """The short number, or inverse of one, that was measured as ``value``; else the value."""
    if value == 0 or not math.isfinite(value):
        return value
    for short in (float(f"{value:.{DIGITS}g}"), 1 / float(f"{1 / value:.{DIGITS}g}")):
        if abs(short - value) <= exactness * abs(value):
            return short
    return value


def _not_understood(lm: Any, why: str) -> UserError:
    return UserError(
        f"{lm.name}: its logits are no scale and softcap of what its LM head makes of the "
        f"decoder's hidden states ({why}); the fused loss knows nothing else, such as a "
        "projection, a norm, a clamp or a mask"
    )
