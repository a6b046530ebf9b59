"""Time and memory of loss and gradients, ours and the peers', beside the bare GEMMs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial

import torch

from npo_fast.bench.candidates import OURS, Candidate
from npo_fast.bench.fp64_oracle import TOLERANCE, Errors, Oracle
from npo_fast.bench.inputs import Inputs, Kind, Shape, make_inputs
from npo_fast.bench.memory import MemoryUnknownError, forward, peak_mib, train
from npo_fast.bench.timing import Times, bare_gemms, interleaved, time_ms
from npo_fast.errors import first_line

WHOLE_LOGITS_BYTES = 4 << 30  # above it, candidates with whole logits are left out
KEPT_LOGITS_BYTES = 1 << 30  # above it, freed memory is not kept: fragments would fill a machine


class WrongResultError(Exception):
    """Raised for a wrong result, which is then not timed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Measurements of one candidate on one problem."""

    shape: str
    inputs: Kind
    peer: str
    loss: str
    option: str
    train_ms: float  # loss and both gradients
    forward_ms: float
    train_ratio: float | None  # to three bare GEMMs; None where their logits do not fit
    forward_ratio: float | None  # to one bare GEMM
    train_peak_mib: float | None = None  # beyond inputs and gradients
    forward_peak_mib: float | None = None
    errors: Errors


@dataclass(frozen=True)
class Result:
    """Measurements of one shape."""

    shape: Shape
    gemms_ms: dict[str, float]  # by kind of inputs
    rows: list[Row]
    refused: dict[str, str]  # candidate: why it was not timed

    @property
    def ours_refused(self) -> bool:
        """Whether a result of this package was wrong."""
        return any(name.startswith(OURS) for name in self.refused)


def check(candidate: Candidate, inputs: Inputs, oracle: Oracle) -> Errors:
    """The errors of a candidate's loss and gradients against fp64.

    Raises:
        WrongResultError: the result with gradients, or the loss alone, is wrong.
    """
    loss, d_hidden, d_weight = train(candidate, inputs)
    errors = oracle.errors(candidate.loss, loss, d_hidden, d_weight)
    alone = oracle.errors(candidate.loss, forward(candidate, inputs), d_hidden, d_weight)
    for result, what in ((errors, "with gradients"), (alone, "loss alone")):
        if not result.acceptable(inputs.shape.dtype):
            values = ", ".join(f"{name} {value:.1e}" for name, value in asdict(result).items())
            raise WrongResultError(
                f"wrong result {what}: relative errors against fp64 are {values}; at most "
                f"{TOLERANCE[inputs.shape.dtype]:.0e} is accepted"
            )
    return errors


def bench(
    shape: Shape,
    candidates: Sequence[Candidate],
    kinds: Iterable[Kind],
    rounds: int,
    device: torch.device,
    log: Callable[[str], None],
) -> Result:
    """Measures every candidate whose results are correct, on every kind of inputs.

    The fastest option of each peer is chosen on the first kind. ``log`` gets a sentence before
    each part.
    """
    rows: list[Row] = []
    gemms_ms: dict[str, float] = {}
    refused: dict[str, str] = {}

    @cache  # measured on the first kind of inputs
    def peaks(candidate: Candidate) -> dict[str, float]:
        try:
            return peak_mib(candidate, shape, device)
        except MemoryUnknownError as error:
            log(f"peak memory of {candidate.key} is unknown: {error}")
            return {}

    for kind in kinds:
        log(f"{shape.name}, {kind}: checking against fp64")
        inputs = make_inputs(shape, kind, device)
        errors = _correct(candidates, inputs, kind, refused)
        candidates = _fastest_options(errors, inputs, device)  # one option for all kinds
        log(f"{shape.name}, {kind}: timing {', '.join(c.key for c in candidates)}")
        timed = _time(candidates, inputs, rounds, device)
        three, first = timed.get("three GEMMs"), timed.get("first GEMM")
        if three is not None:
            gemms_ms[kind] = three.median_ms
        del inputs
        for candidate in candidates:
            train_times = timed[f"{candidate.key} train"]
            forward_times = timed[f"{candidate.key} forward"]
            rows.append(
                Row(
                    shape=shape.name,
                    inputs=kind,
                    peer=candidate.peer,
                    loss=candidate.loss,
                    option=candidate.option,
                    train_ms=train_times.median_ms,
                    forward_ms=forward_times.median_ms,
                    train_ratio=None if three is None else train_times.ratio_to(three),
                    forward_ratio=None if first is None else forward_times.ratio_to(first),
                    errors=errors[candidate],
                    **peaks(candidate),
                )
            )
    return Result(shape, gemms_ms, rows, refused)


def _correct(
    candidates: Sequence[Candidate], inputs: Inputs, kind: Kind, refused: dict[str, str]
) -> dict[Candidate, Errors]:
    """The errors of candidates with correct results; the others go to ``refused``."""
    oracle = Oracle(inputs)
    errors: dict[Candidate, Errors] = {}
    for candidate in candidates:
        if candidate.whole_logits and inputs.shape.logits_bytes > WHOLE_LOGITS_BYTES:
            refused[candidate.key] = "its logits take more than 4 GiB"
            continue
        try:
            errors[candidate] = check(candidate, inputs, oracle)
        except WrongResultError as error:
            refused[candidate.key] = f"{kind} inputs: {error}"
        except Exception as error:  # a peer may fail in any way: report it and continue
            if candidate.peer == OURS:
                raise
            reason = first_line(error) or "no message"
            refused[candidate.key] = f"{kind} inputs: {type(error).__name__}: {reason}"
    return errors


def _fastest_options(
    candidates: Iterable[Candidate], inputs: Inputs, device: torch.device
) -> list[Candidate]:
    """The fastest option of each peer and loss, by one run with gradients."""
    families: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in candidates:
        families.setdefault((candidate.peer, candidate.loss), []).append(candidate)
    return [
        family[0]
        if len(family) == 1
        else min(family, key=lambda c: time_ms(partial(train, c, inputs), device))
        for family in families.values()
    ]


def _time(
    candidates: Iterable[Candidate], inputs: Inputs, rounds: int, device: torch.device
) -> dict[str, Times]:
    calls: dict[str, Callable[[], object]] = {}
    if inputs.shape.logits_bytes <= WHOLE_LOGITS_BYTES:
        calls["three GEMMs"], calls["first GEMM"] = bare_gemms(inputs)
        calls["three GEMMs"]()  # its buffers are touched for the first time here
    for candidate in candidates:
        calls[f"{candidate.key} train"] = partial(train, candidate, inputs)
        calls[f"{candidate.key} forward"] = partial(forward, candidate, inputs)
    keep = inputs.shape.logits_bytes <= KEPT_LOGITS_BYTES
    return interleaved(calls, rounds, device, keep)
