"""What a head does to its raw logits ``a = W h + b`` before the softmax, as one value.

    z = logit_scale * softcap * tanh(a / softcap)      (softcap optional)

This is the one place in Python that lists the settings (``csrc/transform.h`` in C++): operators
take the fields as numbers, by ``schema``, and every function above and below passes a
``HeadTransform`` on. ``docs/design.md`` says what a new setting needs.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from numbers import Real
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from npo_fast.errors import UserError

# settings and coefficients lie within it, and 1 over it: beyond, fp32 has no room for products
LARGEST = 1e30


class HeadTransform(NamedTuple):
    """The elementwise function from raw logits ``a`` to the logits ``z`` of the softmax."""

    softcap: float | None = None  # c of ``c * tanh(a / c)`` (Gemma 2)
    logit_scale: float = 1.0  # factor on the (capped) logits (Cohere, Granite)

    def apply(self, raw: Tensor) -> Tensor:
        """Returns z, a new tensor in the dtype of ``raw``."""
        if self.softcap is not None:
            raw = (raw / self.softcap).tanh_() * self.softcap
        return raw * self.logit_scale

    def apply_with_slope(self, raw: Tensor) -> tuple[Tensor, Tensor | None, float]:
        """Returns z, and slope and factor with ``dz / da = factor * slope``; None stands for 1."""
        if self.softcap is None:
            return raw * self.logit_scale, None, self.logit_scale
        tanh = (raw / self.softcap).tanh_()
        return tanh * self.softcap * self.logit_scale, 1 - tanh.square(), self.logit_scale

    @property
    def largest_slope(self) -> float:
        """An upper bound of ``|dz / da|``."""
        return abs(self.logit_scale)

    @property
    def scale(self) -> float | None:
        """The number s of ``z = s * a``; None where z is no multiple of the raw logits."""
        return self.logit_scale if self == HeadTransform(logit_scale=self.logit_scale) else None


class TransformOptions(TypedDict, total=False):
    """The fields of ``HeadTransform`` as keyword arguments of the public functions."""

    softcap: float | None
    logit_scale: float


class PairedTransformOptions(TransformOptions, total=False):
    """The same for two heads: those of the reference begin with ``ref_``."""

    ref_softcap: float | None
    ref_logit_scale: float


def paired_transforms(**options: Any) -> tuple[HeadTransform, HeadTransform]:
    """Returns the transforms of a model and its reference from ``PairedTransformOptions``."""
    ref = {k.removeprefix("ref_"): v for k, v in options.items() if k.startswith("ref_")}
    model = {k: v for k, v in options.items() if not k.startswith("ref_")}
    return HeadTransform(**model), HeadTransform(**ref)


def schema(prefix: str = "") -> str:
    """Returns the fields as arguments of a ``torch.library`` schema."""
    return f"float? {prefix}softcap, float {prefix}logit_scale"


def check_transform(op: str, transform: HeadTransform, prefix: str = "") -> None:
    """Raises UserError where a field has a value that makes no sense.

    ``op`` and ``prefix`` (of the argument's name) appear in the message.
    """
    for name, value in transform._asdict().items():
        if not isinstance(value, Real) and (value is not None or name != "softcap"):
            cure = "; take its .item()" if isinstance(value, Tensor) else ""
            raise UserError(f"{op}: {prefix}{name} must be a number, got {value!r}{cure}")
    softcap, scale = transform
    if softcap is not None and not 1 / LARGEST <= softcap <= LARGEST:
        raise UserError(
            f"{op}: {prefix}softcap must be positive or None, got {softcap} (None is no cap; the "
            f"range is {1 / LARGEST:g} to {LARGEST:g})"
        )
    if not 1 / LARGEST <= abs(scale) <= LARGEST:
        raise UserError(
            f"{op}: {prefix}logit_scale must be finite and not 0, got {scale} (1 leaves logits as "
            f"they are; the range of its size is {1 / LARGEST:g} to {LARGEST:g})"
        )


def takes_numbers(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``kernel`` as operators call it: with the fields in place of a ``HeadTransform``."""
    fields = len(HeadTransform._fields)
    parameters = inspect.signature(kernel).parameters.values()
    places = [i for i, p in enumerate(parameters) if p.annotation is HeadTransform]

    @wraps(kernel)
    def call(*operands: Any) -> Any:
        arguments = list(operands)
        for i in places:
            arguments[i : i + fields] = [HeadTransform(*arguments[i : i + fields])]
        return kernel(*arguments)

    return call
