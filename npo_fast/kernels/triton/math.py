"""Device functions that Triton lacks, accurate relative to their result, in the interpreter too.

libdevice has them for a GPU, but the interpreter cannot call it. ``activate`` is the head's
transform, and ``transform_arguments`` what a launcher passes for it.
"""

from typing import Any

import triton
import triton.language as tl

from npo_fast.kernels.transform import HeadTransform

# Chebyshev fit of (tanh(x) / x - 1) / x^2 in x^2 for |x| <= 9/16, relative error 5e-9
TANH_SWITCH = tl.constexpr(0.5625)
TANH_C1 = tl.constexpr(-3.333333174e-01)
TANH_C2 = tl.constexpr(1.333307859e-01)
TANH_C3 = tl.constexpr(-5.390250260e-02)
TANH_C4 = tl.constexpr(2.126712363e-02)
TANH_C5 = tl.constexpr(-6.531508001e-03)

# minimax fit of (exp(x) - 1 - x) / x^2 for |x| <= log(2) / 2, relative error of exp 3e-9
TAIL_C0 = tl.constexpr(0.49999994)
TAIL_C1 = tl.constexpr(0.1666652)
TAIL_C2 = tl.constexpr(0.041668393)
TAIL_C3 = tl.constexpr(0.008368781)
TAIL_C4 = tl.constexpr(0.0013814467)


@triton.jit
def tanh(x):
    """Returns tanh(x), accurate relative to itself."""
    square = x * x
    series = TANH_C4 + square * TANH_C5
    series = TANH_C3 + square * series
    series = TANH_C2 + square * series
    series = TANH_C1 + square * series
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    large = tl.where(x < 0, -large, large)
    return tl.where(tl.abs(x) < TANH_SWITCH, x + x * (square * series), large)


@triton.jit
def one_minus_exp(x):
    """Returns ``-expm1(x)`` for x <= 0: 1 - p of a log-prob, without cancellation near p = 1."""
    half = tanh(0.5 * x)
    return -2.0 * half / (1.0 - half)


@triton.jit
def exp_tail(x):
    """Returns ``exp(x) - 1 - x`` for |x| <= log(2) / 2, never negative, accurate relative to it."""
    series = TAIL_C3 + x * TAIL_C4
    series = TAIL_C2 + x * series
    series = TAIL_C1 + x * series
    return x * x * (TAIL_C0 + x * series)


@triton.jit
def softplus(x):
    """Returns ``log(1 + exp(x))``."""
    small = tl.exp(-tl.abs(x))
    rounded = 1.0 + small
    # the ratio corrects the rounding of 1 + small
    log1p = tl.where(
        rounded == 1.0,
        small,
        tl.log(rounded) * (small / tl.where(rounded == 1.0, 1.0, rounded - 1.0)),
    )
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def activate(raw, softcap, logit_scale, SOFTCAP: tl.constexpr):
    """``z = logit_scale * softcap * tanh(raw / softcap)`` and its slope ``dz / d raw``."""
    if SOFTCAP:
        bounded = tanh(raw / softcap)
        z = bounded * softcap * logit_scale
        slope = (1.0 - bounded * bounded) * logit_scale
    else:
        z = raw * logit_scale
        slope = logit_scale
    return z, slope


def transform_arguments(transform: HeadTransform, prefix: str = "") -> dict[str, Any]:
    """Returns the arguments of a kernel that ``activate`` takes, by name."""
    return {
        f"{prefix}softcap": transform.softcap or 1.0,
        f"{prefix}logit_scale": transform.logit_scale,
        f"{prefix.upper()}SOFTCAP": transform.softcap is not None,
    }
