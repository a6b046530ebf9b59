"""Unlearning methods by name: sums of losses on the forget and retain data.

A method is a tuple of ``Term``; the training loop knows nothing else about it.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from npo_fast.errors import UserError
from npo_fast.losses import CEU, DPO, GA, KL, KTO, NLL, NPO, TNPO, WGA, SatImp, SimNPO
from npo_fast.ops import Reduction, SequenceLoss

# "idk" and "alternate" are other answers to the questions of "forget", in the same order
Source = Literal["forget", "retain", "train", "idk", "alternate"]
Positions = Literal["answer", "all"]
Schedule = Literal["summed", "alternating"]


@dataclass(frozen=True)
class Term:
    """``coefficient * reduce(loss over the sequences of source)``"""

    name: str
    source: Source
    loss: SequenceLoss | KL
    reduction: Reduction
    coefficient: float = 1.0
    preferred: Source | None = None
    """Its answers stand before those of ``source``, in pairs: for a loss with ``group`` 2."""
    baseline: Source | None = None
    """Its mean log-ratio over the step, without gradient, is the ``z`` of the loss (KTO)."""
    over: tuple[Source, ...] = ()
    """Sources whose sequences in a step the mean is taken over, where not its own alone."""
    positions: Positions = "answer"
    """The tokens that it looks at; for a KL also "all", prompts included."""

    @property
    def batch_key(self) -> tuple[Source, ...]:
        """The sources whose sequences go through the model for this term, side by side."""
        return (self.source,) if self.preferred is None else (self.preferred, self.source)

    @property
    def reads(self) -> tuple[Source, ...]:
        others = (self.preferred, self.baseline)
        return (self.source, *(source for source in others if source is not None))

    def at_baseline(self, z: float) -> "Term":
        assert isinstance(self.loss, KTO)
        return replace(self, loss=replace(self.loss, z=z))


WEIGHTS = ("forget", "retain", "kl")  # coefficients that multiply a term


@dataclass(frozen=True)
class Coefficients:
    """What a method can be tuned with. None is the method's own default."""

    beta: float | None = None
    delta: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    gamma: float | None = None
    kl: float | None = None
    forget: float | None = None
    retain: float | None = None

    def given(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def for_method(self, name: str) -> "Coefficients":
        """Those that the method has, to run several methods with one set of coefficients."""
        known = coefficients_of(name)
        return Coefficients(**{k: v for k, v in self.given().items() if k in known})


# Makers of terms: the parameters are the coefficients that a method has, with their defaults.


def _ga(forget: float = 1.0) -> Term:
    return Term("GA", "forget", GA(), "token_mean", forget)


def _npo(beta: float = 0.1, forget: float = 1.0) -> Term:
    return Term("NPO", "forget", NPO(beta), "mean", forget)


def _simnpo(beta: float = 2.5, delta: float = 0.0, forget: float = 1.0) -> Term:
    return Term("SimNPO", "forget", SimNPO(beta, delta), "mean", forget)


def _dpo(beta: float = 0.1, forget: float = 1.0) -> Term:
    return Term("DPO", "forget", DPO(beta), "mean", forget, preferred="idk")


def _altpo(beta: float = 0.1, forget: float = 1.0) -> Term:
    return Term("AltPO", "forget", DPO(beta), "mean", forget, preferred="alternate")


def _kto(beta: float = 0.1, forget: float = 1.0) -> Term:
    return Term("KTO", "forget", KTO(beta), "mean", forget, baseline="idk")


def _tnpo(beta: float = 0.1, forget: float = 1.0) -> Term:
    return Term("TNPO", "forget", TNPO(beta), "token_mean", forget)


def _wga(beta: float = 1.0, forget: float = 1.0) -> Term:
    return Term("WGA", "forget", WGA(beta), "token_mean", forget)


def _satimp(beta1: float = 5.0, beta2: float = 1.0, forget: float = 1.0) -> Term:
    return Term("SatImp", "forget", SatImp(beta1, beta2), "token_mean", forget)


def _ceu(forget: float = 1.0) -> Term:
    return Term("CEU", "forget", CEU(), "token_mean", forget)


def _idk(forget: float = 1.0) -> Term:
    return Term("IDK NLL", "idk", NLL(), "token_mean", forget, over=("idk", "retain"))


def _retain_beside_idk(retain: float = 1.0) -> Term:
    return Term("retain NLL", "retain", NLL(), "token_mean", retain, over=("idk", "retain"))


def _retain(retain: float = 1.0) -> Term:
    return Term("retain NLL", "retain", NLL(), "token_mean", retain)


def _retain_kl(kl: float = 1.0) -> Term:
    return Term("retain KL", "retain", KL(), "token_mean", kl)


def _forget_kl(kl: float = 1.0) -> Term:
    return Term("forget KL", "forget", KL(), "token_mean", -kl)


def _undial(gamma: float = 10.0, forget: float = 1.0) -> Term:
    return Term("UNDIAL", "forget", KL(demotion=gamma), "token_mean", forget)


METHODS: dict[str, tuple[Callable[..., Term], ...]] = {
    "GA": (_ga,),
    "GA+RT": (_ga, _retain),
    "GA+KL": (_ga, _retain_kl),
    "GA+forgetKL": (_ga, _forget_kl),
    "IDK+RT": (_idk, _retain_beside_idk),
    "NPO": (_npo,),
    "NPO+RT": (_npo, _retain),
    "NPO+KL": (_npo, _retain_kl),
    "DPO": (_dpo,),
    "DPO+RT": (_dpo, _retain),
    "DPO+KL": (_dpo, _retain_kl),
    "KTO": (_kto,),
    "KTO+RT": (_kto, _retain),
    "KTO+KL": (_kto, _retain_kl),
    "SimNPO": (_simnpo,),
    "SimNPO+RT": (_simnpo, _retain),
    "TNPO": (_tnpo,),
    "TNPO+RT": (_tnpo, _retain),
    "WGA": (_wga,),
    "WGA+RT": (_wga, _retain),
    "SatImp": (_satimp,),
    "SatImp+RT": (_satimp, _retain),
    "CEU": (_ceu,),
    "CEU+RT": (_ceu, _retain),
    "AltPO": (_altpo,),
    "AltPO+RT": (_altpo, _retain),
    "UNDIAL": (_undial,),
    "UNDIAL+RT": (_undial, _retain),
}
FINETUNE = (Term("NLL", "train", NLL(), "token_mean"),)


def build_method(
    name: str, coefficients: Coefficients | None = None, kl_positions: Positions = "answer"
) -> tuple[Term, ...]:
    """The terms of a method, by its name in any case.

    ``kl_positions="all"`` takes the mean of a KL over every position of the sequences, prompts
    included, instead of over answer tokens.

    Raises:
        UserError: an unknown name (the message suggests the nearest), a coefficient that the
            method does not have (the message names those which do), or a bad value.
    """
    name = canonical_name(name)
    given = coefficients.given() if coefficients else {}
    for field in given:
        if field not in coefficients_of(name):
            others = [other for other in METHODS if field in coefficients_of(other)]
            raise UserError(f"{name} has no {_spell(field)}; these have: {', '.join(others)}")
    for field in WEIGHTS:
        if not 0 <= given.get(field, 1.0) < float("inf"):
            raise UserError(f"the {_spell(field)} must be 0 or more, got {given[field]}")
    try:
        terms = tuple(
            make(**{field: given[field] for field in _parameters(make) if field in given})
            for make in METHODS[name]
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if kl_positions == "answer":
        return terms
    if "kl" not in coefficients_of(name):
        others = [other for other in METHODS if "kl" in coefficients_of(other)]
        raise UserError(f"{name} has no KL to take over all positions: {', '.join(others)} have")
    return tuple(
        replace(term, positions=kl_positions) if isinstance(term.loss, KL) else term
        for term in terms
    )


def canonical_name(name: str) -> str:
    """As in ``METHODS``: "npo_rt" is NPO+RT."""
    wanted = name.upper().replace("_", "+").replace("-", "+").replace("CE+U", "CEU")
    known = {method.upper(): method for method in METHODS}
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
        hint = f"; did you mean {known[near[0]]}?" if near else ""
        raise UserError(f"unknown method {name!r}{hint} Known: {', '.join(METHODS)}")
    return known[wanted]


def coefficients_of(name: str) -> dict[str, float]:
    """The coefficients that a method has, with their defaults."""
    return {
        field: parameter.default
        for make in METHODS[canonical_name(name)]
        for field, parameter in _parameters(make).items()
    }


def schedule_steps(terms: tuple[Term, ...], schedule: Schedule) -> tuple[tuple[Term, ...], ...]:
    """The terms of each optimiser step that a batch gets: their sum, or one side after the other.

    Raises:
        UserError: alternating steps for a method without both a forget and a retain term.
    """
    if schedule == "summed":
        return (terms,)
    forget = tuple(term for term in terms if term.source != "retain")
    retain = tuple(term for term in terms if term.source == "retain")
    if not (forget and retain):
        names = ", ".join(term.name for term in terms)
        raise UserError(
            f"an alternating schedule takes turns between forget and retain data, and this method "
            f"has one of them ({names}): use a method with +RT, or --schedule summed"
        )
    return forget, retain


def _parameters(make: Callable[..., Term]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(make).parameters)


def _spell(field: str) -> str:
    return f"{field} coefficient" if field in WEIGHTS else field
