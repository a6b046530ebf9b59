"""Unlearning methods by name: sums of losses on the forget and retain data.

A method is a tuple of ``Term``; the training loop knows nothing else about it.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from npo_fast.errors import UserError
from npo_fast.losses import GA, NLL, NPO, SimNPO
from npo_fast.ops import Reduction, SequenceLoss

Source = Literal["forget", "retain", "train"]


@dataclass(frozen=True)
class Term:
    """``coefficient * reduce(loss over the sequences of source)``"""

    name: str
    source: Source
    loss: SequenceLoss
    reduction: Reduction
    coefficient: float = 1.0


@dataclass(frozen=True)
class Coefficients:
    """What a method can be tuned with; each method reads those that it has."""

    beta: float | None = None  # None: the method's own default
    delta: float = 0.0
    forget: float = 1.0
    retain: float = 1.0


def _ga(c: Coefficients) -> Term:
    return Term("GA", "forget", GA(), "token_mean", c.forget)


def _npo(c: Coefficients) -> Term:
    return Term("NPO", "forget", NPO() if c.beta is None else NPO(c.beta), "mean", c.forget)


def _simnpo(c: Coefficients) -> Term:
    loss = SimNPO(delta=c.delta) if c.beta is None else SimNPO(c.beta, c.delta)
    return Term("SimNPO", "forget", loss, "mean", c.forget)


def _retain(c: Coefficients) -> Term:
    return Term("retain NLL", "retain", NLL(), "token_mean", c.retain)


def _finetune(c: Coefficients) -> Term:
    return Term("NLL", "train", NLL(), "token_mean", 1.0)


METHODS: dict[str, tuple[Callable[[Coefficients], Term], ...]] = {
    "GA": (_ga,),
    "GA+RT": (_ga, _retain),
    "NPO": (_npo,),
    "NPO+RT": (_npo, _retain),
    "SimNPO": (_simnpo,),
    "SimNPO+RT": (_simnpo, _retain),
}
FINETUNE = (_finetune(Coefficients()),)


def build_method(name: str, coefficients: Coefficients | None = None) -> tuple[Term, ...]:
    """The terms of a method, by its name in any case.

    Raises:
        UserError: an unknown name (the message suggests the nearest) or a bad coefficient.
    """
    wanted = name.upper().replace("_", "+").replace("-", "+")
    by_name = {known.upper(): makers for known, makers in METHODS.items()}
    if wanted not in by_name:
        near = difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.4)
        names = {known.upper(): known for known in METHODS}
        hint = f"; did you mean {names[near[0]]}?" if near else ""
        raise UserError(f"unknown method {name!r}{hint} Known: {', '.join(METHODS)}")
    coefficients = coefficients or Coefficients()
    for field in ("forget", "retain"):
        value = getattr(coefficients, field)
        if not 0 <= value < float("inf"):
            raise UserError(f"the {field} coefficient must be 0 or more, got {value}")
    try:
        return tuple(make(coefficients) for make in by_name[wanted])
    except ValueError as error:
        raise UserError(str(error)) from error
