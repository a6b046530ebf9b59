"""Unlearning methods by name: sums of losses on the forget and retain data.

A method is a tuple of ``Term``; the training loop knows nothing else about it. To add one: write
its loss in ``npo_fast.losses`` if it is new, an entry of ``_TERMS`` with the default of each
coefficient, and its name in ``METHODS``; a coefficient that no other method has is one more line of
``Coefficients``. Flags, help and the report follow. ``PRESETS``: the defaults of other code bases.
"""

import difflib
import inspect
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from npo_fast.errors import UserError
from npo_fast.losses import (
    CEU,
    DPO,
    GA,
    KL,
    KTO,
    NLL,
    NPO,
    RMU,
    TNPO,
    WGA,
    HeldStates,
    LayerLoss,
    SatImp,
    SimNPO,
)  # fmt: skip
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
    loss: SequenceLoss | KL | LayerLoss
    reduction: Reduction
    coefficient: float = 1.0
    preferred: Source | None = None
    """Its answers stand before those of ``source``, in pairs: for a loss with ``group`` 2."""
    baseline: Source | None = None
    """Its mean log-ratio over the step, without gradient, is the ``z`` of the loss (KTO)."""
    over: tuple[Source, ...] = ()
    """Sources whose sequences in a step the mean is taken over, where not its own alone."""
    positions: Positions = "answer"
    """The tokens that it is taken over; for a KL or a layer also "all", prompts included."""

    @property
    def batch_key(self) -> tuple[Source, ...]:
        """The sources whose sequences alternate in the micro-batches of this term."""
        return (self.source,) if self.preferred is None else (self.preferred, self.source)

    @property
    def reads(self) -> tuple[Source, ...]:
        """Every source that the term needs."""
        others = (self.preferred, self.baseline)
        return (self.source, *(source for source in others if source is not None))

    @property
    def skip_first(self) -> int:
        """Tokens at the start of each answer that carry no loss, and do not count in its mean."""
        return self.loss.skip_first if isinstance(self.loss, CEU) else 0

    def at_baseline(self, z: float) -> "Term":
        """The same term with ``z`` as the baseline of its loss."""
        assert isinstance(self.loss, KTO)
        return replace(self, loss=replace(self.loss, z=z))

    def seeded(self, seed: int) -> "Term":
        """The same term with what its loss draws at random drawn by ``seed`` (RMU's direction)."""
        if not isinstance(self.loss, RMU):
            return self
        return replace(self, loss=replace(self.loss, seed=seed))


def _coefficient(description: str, weights_term: bool = False, note: str = "") -> Any:
    metadata = {"description": description, "weights_term": weights_term, "note": note}
    return field(default=None, metadata=metadata)


@dataclass(frozen=True)
class Coefficients:
    """What a method can be tuned with. None is the method's own default.

    Those that weight a term must be 0 or more; a loss checks the others itself.
    """

    beta: float | None = _coefficient(
        "Inverse temperature (WGA: exponent)",
        note=' "auto" (NPO): chosen from the forget data; add --retrained, --holdout or '
        "--base-model.",
    )
    delta: float | None = _coefficient("SimNPO: margin")
    beta1: float | None = _coefficient("SatImp: exponent of p")
    beta2: float | None = _coefficient("SatImp: exponent of 1 - p")
    gamma: float | None = _coefficient("UNDIAL: strength, in nats")
    epsilon: float | None = _coefficient("TNPO: added to the denominator of a token's weight")
    skip_first: int | None = _coefficient("CEU: tokens at the start of an answer without a loss")
    steering: float | None = _coefficient(
        "RMU: length of the state that forget tokens are steered to"
    )
    layer: int | None = _coefficient(
        "RMU: decoder layer whose output is steered, counted from 0",
        note=" The papers take 7 of 32 and of 16.",
    )
    forget: float | None = _coefficient("Weight of the forget term", weights_term=True)
    retain: float | None = _coefficient(
        "Weight of the retain term",
        weights_term=True,
        note=" The paper takes 5 to forget half and 12 to forget 90 percent.",
    )
    kl: float | None = _coefficient(
        "Weight of the KL to the model before training",
        weights_term=True,
        note=" GA+forgetKL subtracts it, as the NPO paper's formula; the paper's code adds it.",
    )

    def given(self) -> dict[str, float]:
        """Those that are not left to the method."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def over(self, others: Mapping[str, float]) -> "Coefficients":
        """These, and of ``others`` those that are not given here."""
        return Coefficients(**{**others, **self.given()})  # type: ignore[arg-type]

    def for_method(self, name: str) -> "Coefficients":
        """Those that the method has, to run several methods with one set of coefficients."""
        known = coefficients_of(name)
        given = {name: value for name, value in self.given().items() if name in known}
        return Coefficients().over(given)


# Makers of terms, by their part of a method's name: their parameters are the coefficients that
# a term has, with the defaults.
_TERMS: dict[str, Callable[..., Term]] = {
    "GA": lambda forget=1.0: Term("GA", "forget", GA(), "token_mean", forget),
    "NPO": lambda beta=0.1, forget=1.0: Term("NPO", "forget", NPO(beta), "mean", forget),
    "DPO": lambda beta=0.1, forget=1.0: Term(
        "DPO", "forget", DPO(beta), "mean", forget, preferred="idk"
    ),
    "AltPO": lambda beta=0.1, forget=1.0: Term(
        "AltPO", "forget", DPO(beta), "mean", forget, preferred="alternate"
    ),
    "KTO": lambda beta=0.1, forget=1.0: Term(
        "KTO", "forget", KTO(beta), "mean", forget, baseline="idk"
    ),
    "SimNPO": lambda beta=2.5, delta=0.0, forget=1.0: Term(
        "SimNPO", "forget", SimNPO(beta, delta), "mean", forget
    ),
    "TNPO": lambda beta=0.1, epsilon=0.0, forget=1.0: Term(
        "TNPO", "forget", TNPO(beta, epsilon), "token_mean", forget
    ),
    "WGA": lambda beta=1.0, forget=1.0: Term("WGA", "forget", WGA(beta), "token_mean", forget),
    "SatImp": lambda beta1=5.0, beta2=1.0, forget=1.0: Term(
        "SatImp", "forget", SatImp(beta1, beta2), "token_mean", forget
    ),
    "CEU": lambda skip_first=0, forget=1.0: Term(
        "CEU", "forget", CEU(skip_first), "token_mean", forget
    ),
    "UNDIAL": lambda gamma=10.0, forget=1.0: Term(
        "UNDIAL", "forget", KL(demotion=gamma), "token_mean", forget
    ),
    "RMU": lambda steering=20.0, layer=None, forget=1.0: Term(
        "RMU", "forget", RMU(layer, steering), "mean", forget
    ),
    "held": lambda layer=None, retain=1.0: Term(
        "held states", "retain", HeldStates(layer), "mean", retain
    ),
    "IDK": lambda forget=1.0: Term("IDK NLL", "idk", NLL(), "token_mean", forget),
    "RT": lambda retain=1.0: Term("retain NLL", "retain", NLL(), "token_mean", retain),
    "KL": lambda kl=1.0: Term("retain KL", "retain", KL(), "token_mean", kl),
    # the NPO paper's formula subtracts this KL; its code adds it
    "forgetKL": lambda kl=1.0: Term("forget KL", "forget", KL(), "token_mean", -kl),
}
Preset = Literal["open-unlearning"]
# What other code bases take where a coefficient is not given, by part of a method's name; what is
# not here is as above. open-unlearning (configs/trainer) calls the forget coefficient gamma and the
# retain coefficient alpha. It has no TNPO: that line is of its authors' code, tmlr-group/G-effect.
PRESETS: Mapping[Preset, Mapping[str, Mapping[str, float]]] = {
    "open-unlearning": {
        "SimNPO": {"beta": 4.5, "forget": 0.125},
        "SatImp": {"forget": 0.1},
        "TNPO": {"beta": 4.0, "epsilon": 1e-5},
        "CEU": {"skip_first": 1},
        "RMU": {"steering": 2.0, "layer": 7, "retain": 1.0},
    },
}
METHODS = (
    "GA", "GA+RT", "GA+KL", "GA+forgetKL", "IDK+RT", "NPO", "NPO+RT", "NPO+KL", "DPO", "DPO+RT",
    "DPO+KL", "KTO", "KTO+RT", "KTO+KL", "SimNPO", "SimNPO+RT", "TNPO", "TNPO+RT", "WGA", "WGA+RT",
    "SatImp", "SatImp+RT", "CEU", "CEU+RT", "AltPO", "AltPO+RT", "UNDIAL", "UNDIAL+RT",
    "RMU",
)  # fmt: skip
_PARTS = {"RMU": ("RMU", "held")}  # terms of a method, where its name does not spell them
FINETUNE = (Term("NLL", "train", NLL(), "token_mean"),)


@dataclass(frozen=True)
class Coefficient:
    """One field of ``Coefficients``, as flags, help texts and tables need it."""

    name: str
    """As in ``Coefficients``."""
    kind: type
    """float or int."""
    description: str
    weights_term: bool
    """It multiplies a term, and must be 0 or more."""
    note: str = ""

    @property
    def label(self) -> str:
        """In messages and tables: "beta", "retain coefficient"."""
        return f"{self.name} coefficient" if self.weights_term else self.name

    @property
    def flag(self) -> str:
        """As an option of the command line, without dashes: "beta", "retain_coefficient"."""
        return self.label.replace(" ", "_")

    @property
    def defaults(self) -> dict[str, float | None]:
        """The default of each term that has the coefficient; None follows from the model."""
        return {
            make().name: parameters[self.name].default
            for term, make in _TERMS.items()
            if self.name in (parameters := _parameters(term))
        }

    @property
    def help(self) -> str:
        """Such as "Inverse temperature (WGA: exponent). Default: 0.1; SimNPO 2.5, WGA 1."."""
        usual, _ = Counter(self.defaults.values()).most_common(1)[0]
        if usual is None:  # layer
            return f"{self.description}. Default: the last of the first quarter.{self.note}"
        others = [f"{term} {value:g}" for term, value in self.defaults.items() if value != usual]
        defaults = "; ".join([f"{usual:g}", *([", ".join(others)] if others else [])])
        return f"{self.description}. Default: {defaults}.{self.note}"


COEFFICIENTS: Mapping[str, Coefficient] = {
    declared.name: Coefficient(
        declared.name, typing.get_args(declared.type)[0], **declared.metadata
    )
    for declared in fields(Coefficients)
}


def build_method(
    name: str,
    coefficients: Coefficients | None = None,
    kl_positions: Positions = "answer",
    preset: Preset | None = None,
) -> tuple[Term, ...]:
    """The terms of a method, by its name in any case.

    ``kl_positions="all"`` takes the mean of a KL over every position of the sequences, prompts
    included, instead of over answer tokens; RMU's distances too. ``preset`` takes the defaults of
    another code base (``PRESETS``) for coefficients that are not given.

    Raises:
        UserError: an unknown name (the message suggests the nearest), a coefficient that the
            method does not have (the message names those which do), or a bad value.
    """
    name = canonical_name(name)
    coefficients = coefficients or Coefficients()
    for key, value in coefficients.given().items():
        coefficient = COEFFICIENTS[key]
        if key not in coefficients_of(name):
            others = ", ".join(_methods_with(key))
            raise UserError(f"{name} has no {coefficient.label}; these have: {others}")
        if coefficient.weights_term and not 0 <= value < float("inf"):
            raise UserError(f"the {coefficient.label} must be 0 or more, got {value}")
    given = coefficients.over(preset_of(name, preset)).given()
    try:
        terms = tuple(
            _TERMS[term](**{key: given[key] for key in _parameters(term) if key in given})
            for term in _parts(name)
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if name == "IDK+RT":  # one mean over the tokens of both
        terms = tuple(replace(term, over=("idk", "retain")) for term in terms)
    if kl_positions == "answer":
        return terms
    if not {"kl", "layer"} & {*coefficients_of(name)}:
        others = ", ".join([*_methods_with("kl"), *_methods_with("layer")])
        raise UserError(f"{name} has no KL to take over all positions: {others} have")
    return tuple(
        replace(term, positions=kl_positions) if isinstance(term.loss, KL | LayerLoss) else term
        for term in terms
    )


def canonical_name(name: str) -> str:
    """The name as in ``METHODS``: "npo_rt" is NPO+RT; raises ``UserError`` for an unknown one."""
    wanted = name.upper().replace("_", "+").replace("-", "+").replace("CE+U", "CEU")
    known = {method.upper(): method for method in METHODS}
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
        hint = f"; did you mean {known[near[0]]}?" if near else ""
        raise UserError(f"unknown method {name!r}{hint} Known: {', '.join(METHODS)}")
    return known[wanted]


def coefficients_of(name: str) -> dict[str, float | None]:
    """The coefficients that a method has, with their defaults; None follows from the model."""
    return {
        key: parameter.default
        for term in _parts(canonical_name(name))
        for key, parameter in _parameters(term).items()
    }


def preset_of(name: str, preset: Preset | None) -> dict[str, float]:
    """The coefficients that a preset sets for a method."""
    if preset is None:
        return {}
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    parts = (PRESETS[preset].get(term, {}) for term in _parts(canonical_name(name)))
    return {key: value for part in parts for key, value in part.items()}


def preset_help(preset: Preset) -> str:
    """What it sets, in words: "SimNPO beta 4.5, forget coefficient 0.125; SatImp …"."""
    return "; ".join(
        f"{term} "
        + ", ".join(f"{COEFFICIENTS[key].label} {value:g}" for key, value in values.items())
        for term, values in PRESETS[preset].items()
    )


def schedule_steps(terms: tuple[Term, ...], schedule: Schedule) -> tuple[tuple[Term, ...], ...]:
    """The terms of each optimizer step that a batch gets: their sum, or one side after the other.

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


def _parts(name: str) -> tuple[str, ...]:
    """The keys of ``_TERMS`` that make up a method."""
    return _PARTS.get(name) or tuple(name.split("+"))


def _methods_with(coefficient: str) -> list[str]:
    return [name for name in METHODS if coefficient in coefficients_of(name)]


def _parameters(term: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_TERMS[term]).parameters
