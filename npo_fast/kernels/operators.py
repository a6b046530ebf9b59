"""The operators ``torch.ops.npo_fast``: their schemas, their default kernels, their output shapes.

The plain PyTorch kernels of ``reference`` serve every device. A faster kernel registers itself for
its device key over them, and nothing above changes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npo_fast.kernels import reference
from npo_fast.kernels.layout import empty_gradients, empty_per_row
from npo_fast.kernels.transform import schema, takes_numbers


def _per_row(count: int) -> Callable[..., Any]:
    """Returns the shapes of ``count`` results of one number a row of the first operand."""

    def shapes(rows: Tensor, *_: Any) -> Any:
        results = tuple(empty_per_row(rows) for _ in range(count))
        return results if count > 1 else results[0]

    return shapes


def _npo_head_shapes(log_probs: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, ...]:
    values = log_probs.new_empty(cu_seqlens.shape[0] - 1)
    return values, torch.empty_like(values), torch.empty_like(log_probs)


def _backward_shapes(
    g: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return empty_gradients(hidden, weight, bias, rest[-1])


def _no_result(*_: Any) -> None:
    return None


_HEAD = "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias"
# schema -> the shapes and dtypes of the results; the kernel has the operator's name
_SCHEMAS: dict[str, Callable[..., Any]] = {
    f"row_log_probs(Tensor logits, Tensor labels, Tensor? target_logits, {schema()}) "
    "-> (Tensor log_probs, Tensor lse, Tensor shift, Tensor share)": _per_row(4),
    "row_gradient_(Tensor(a!) logits, Tensor labels, Tensor log_probs, Tensor shift, "
    f"Tensor share, Tensor g, {schema()}) -> ()": _no_result,
    f"label_logits({_HEAD}) -> Tensor": _per_row(1),
    f"tile_log_probs_(Tensor logits, Tensor labels, {schema()}, Tensor(a!) others, "
    "Tensor(b!) target) -> ()": _no_result,
    "npo_head(Tensor log_probs, Tensor cu_seqlens, Tensor ref_log_probs, float beta) "
    "-> (Tensor values, Tensor sequence_log_probs, Tensor g)": _npo_head_shapes,
    f"linear_log_probs({_HEAD}, {schema()}) -> (Tensor log_probs, Tensor lse)": _per_row(2),
    f"linear_log_probs_backward(Tensor g, {_HEAD}, Tensor log_probs, Tensor lse, {schema()}, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor)": _backward_shapes,
    f"row_kl_(Tensor(a!) logits, Tensor ref_logits, {schema()}, {schema('ref_')}, "
    "Tensor? lse=None, Tensor? ref_lse=None) -> Tensor": _per_row(1),
    "scale_(Tensor(a!) values, Tensor factor) -> ()": _no_result,
}

library = torch.library.Library("npo_fast", "DEF")
# by name: the kernel as the operator calls it, and the shapes and dtypes that it returns
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
for _schema, _shapes in _SCHEMAS.items():
    _name = library.define(_schema)
    OPERATORS[_name] = takes_numbers(getattr(reference, _name)), _shapes
    library.impl(_name, OPERATORS[_name][0], "CompositeExplicitAutograd")
    torch.library.register_fake(f"npo_fast::{_name}", _shapes, lib=library)
