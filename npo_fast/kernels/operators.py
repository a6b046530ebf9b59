"""The operators ``torch.ops.npo_fast``: their schemas, their default kernels, their output shapes.

The plain PyTorch kernels of ``reference`` serve every device. A faster kernel registers itself for
its device key over them, and nothing above changes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npo_fast.kernels import reference
from npo_fast.kernels.layout import empty_gradients
from npo_fast.kernels.reference.rows import empty_per_row
from npo_fast.kernels.transform import schema, takes_numbers

library = torch.library.Library("npo_fast", "DEF")
library.define(
    f"row_log_probs(Tensor logits, Tensor labels, Tensor? target_logits, {schema()}) "
    "-> (Tensor log_probs, Tensor lse, Tensor shift, Tensor share)"
)
library.define(
    "row_gradient_(Tensor(a!) logits, Tensor labels, Tensor log_probs, Tensor shift, "
    f"Tensor share, Tensor g, {schema()}) -> ()"
)
library.define("label_logits(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias) -> Tensor")
library.define(
    f"tile_log_probs_(Tensor logits, Tensor labels, {schema()}, "
    "Tensor(a!) others, Tensor(b!) target) -> ()"
)
library.define(
    "npo_head(Tensor log_probs, Tensor cu_seqlens, Tensor ref_log_probs, float beta) "
    "-> (Tensor values, Tensor sequence_log_probs, Tensor g)"
)
library.define(
    "linear_log_probs(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, "
    f"{schema()}) -> (Tensor log_probs, Tensor lse)"
)
library.define(
    "linear_log_probs_backward(Tensor g, Tensor hidden, Tensor weight, Tensor labels, "
    f"Tensor? bias, Tensor log_probs, Tensor lse, {schema()}, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor)"
)
library.define("scale_(Tensor(a!) values, Tensor factor) -> ()")
library.define(
    f"row_kl_(Tensor(a!) logits, Tensor ref_logits, {schema()}, {schema('ref_')}) -> Tensor"
)


def _row_fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_per_row(logits),
        empty_per_row(logits),
        empty_per_row(logits),
        empty_per_row(logits),
    )


def _label_fake(hidden: Tensor, *_: Any) -> Tensor:
    return empty_per_row(hidden)


def _npo_head_fake(
    log_probs: Tensor, cu_seqlens: Tensor, ref_log_probs: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    values = log_probs.new_empty(cu_seqlens.shape[0] - 1)
    return values, torch.empty_like(values), torch.empty_like(log_probs)


def _no_result(*_: Any) -> None:
    return None


def _linear_fake(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_per_row(hidden), empty_per_row(hidden)


def _linear_backward_fake(
    g: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, rest[-1])


def _row_kl_fake(logits: Tensor, *_: Any) -> Tensor:
    return empty_per_row(logits)


# by name: the kernel as the operator calls it, and the shapes and dtypes that it returns
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    name: (takes_numbers(kernel), shapes)
    for name, kernel, shapes in (
        ("row_log_probs", reference.row_log_probs, _row_fake),
        ("row_gradient_", reference.row_gradient_, _no_result),
        ("label_logits", reference.label_logits, _label_fake),
        ("tile_log_probs_", reference.tile_log_probs_, _no_result),
        ("npo_head", reference.npo_head, _npo_head_fake),
        ("linear_log_probs", reference.linear_log_probs, _linear_fake),
        ("linear_log_probs_backward", reference.linear_log_probs_backward, _linear_backward_fake),
        ("row_kl_", reference.row_kl_, _row_kl_fake),
        ("scale_", reference.scale_, _no_result),
    )
}
for _name, (_kernel, _shapes) in OPERATORS.items():
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"npo_fast::{_name}", _shapes, lib=library)
