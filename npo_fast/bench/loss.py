"""Loss with gradients and loss alone, ours and the peers', beside the GEMMs none can avoid."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from npo_fast.bench.candidates import OURS, Candidate
from npo_fast.bench.fp64_oracle import TOLERANCE, Errors, Truth
from npo_fast.bench.inputs import Inputs, Kind, Shape, make_inputs
from npo_fast.bench.memory import MemoryUnknownError, forward, peak_mib, train
from npo_fast.bench.timing import bare_gemms, interleaved, time_ms

WHOLE_LOGITS_BYTES = 4 << 30  # what needs all logits at a time is left out above this


class WrongResultError(Exception):
    """A result that is not timed."""


@dataclass(frozen=True)
class Row:
    """One candidate on one problem."""

    shape: str
    inputs: Kind
    peer: str
    loss: str
    option: str
    train_ms: float  # loss and both gradients
    forward_ms: float
    train_ratio: float | None  # to three bare GEMMs; None where their logits do not fit
    forward_ratio: float | None  # to one
    train_peak_mib: float | None  # beyond inputs and gradients
    forward_peak_mib: float | None
    errors: Errors


@dataclass(frozen=True)
class Result:
    """Of one shape."""

    shape: Shape
    gemms_ms: dict[str, float]  # by kind of inputs
    rows: list[Row]
    refused: dict[str, str]  # candidate: why it was not timed

    @property
    def ours_refused(self) -> bool:
        return any(name.startswith(OURS) for name in self.refused)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def check(candidate: Candidate, inputs: Inputs, truth: Truth) -> Errors:
    """The errors of a result with gradients; raises where it, or the loss alone, is wrong."""
    loss, d_hidden, d_weight = train(candidate, inputs)
    errors = truth.errors(candidate.loss, loss, d_hidden, d_weight)
    alone = truth.errors(candidate.loss, forward(candidate, inputs), d_hidden, d_weight)
    for found, what in ((errors, "with gradients"), (alone, "loss alone")):
        if not found.acceptable(inputs.shape.dtype):
            off = ", ".join(f"{name} {value:.1e}" for name, value in asdict(found).items())
            raise WrongResultError(
                f"wrong result {what}: relative errors against fp64 are {off}; at most "
                f"{TOLERANCE[inputs.shape.dtype]:.0e} is accepted"
            )
    return errors


def bench(
    shape: Shape,
    candidates: Sequence[Candidate],
    kinds: Iterable[Kind],
    rounds: int,
    device: torch.device,
    say: Callable[[str], None],
) -> Result:
    """Every candidate that is right, on every kind of inputs; options are chosen on the first."""
    rows: list[Row] = []
    gemms_ms: dict[str, float] = {}
    refused: dict[str, str] = {}
    peaks: dict[str, dict[str, float]] = {}
    for kind in kinds:
        say(f"{shape.name}, {kind}: checking against fp64")
        inputs = make_inputs(shape, kind, device)
        right = _right_ones(candidates, inputs, kind, refused)
        candidates = chosen = _fastest_options(right, inputs, device)  # one option for all kinds
        say(f"{shape.name}, {kind}: timing {', '.join(c.key for c in chosen)}")
        timed = _time(chosen, inputs, rounds, device)
        three, first = timed.get("three GEMMs"), timed.get("first GEMM")
        if three is not None:
            gemms_ms[kind] = three.median_ms
        del inputs
        for candidate in chosen:
            if candidate.key not in peaks:
                peaks[candidate.key] = _peaks(candidate, shape, device, say)
            peak = peaks[candidate.key]
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
                    train_peak_mib=peak.get("train_peak_mib"),
                    forward_peak_mib=peak.get("forward_peak_mib"),
                    errors=right[candidate],
                )
            )
    return Result(shape, gemms_ms, rows, refused)


def _right_ones(
    candidates: Sequence[Candidate], inputs: Inputs, kind: Kind, refused: dict[str, str]
) -> dict[Candidate, Errors]:
    """Those whose results are correct; the others go to ``refused``."""
    truth = Truth(inputs)
    right: dict[Candidate, Errors] = {}
    for candidate in candidates:
        if candidate.whole_logits and inputs.shape.logits_bytes > WHOLE_LOGITS_BYTES:
            refused[candidate.key] = "its logits take more than 4 GiB"
            continue
        try:
            right[candidate] = check(candidate, inputs, truth)
        except WrongResultError as error:
            refused[candidate.key] = f"{kind} inputs: {error}"
        except Exception as error:  # somebody else's code, any way it fails: say so and go on
            if candidate.peer == OURS:
                raise
            lines = str(error).strip().splitlines()
            first = lines[0] if lines else "no message"
            refused[candidate.key] = f"{kind} inputs: {type(error).__name__}: {first}"
    return right


def _fastest_options(
    right: Iterable[Candidate], inputs: Inputs, device: torch.device
) -> list[Candidate]:
    """Of each peer and loss the option that trained fastest in one run after the check."""
    families: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in right:
        families.setdefault((candidate.peer, candidate.loss), []).append(candidate)

    def train_ms_of(candidate: Candidate) -> float:
        return time_ms(partial(train, candidate, inputs), device)

    return [
        family[0] if len(family) == 1 else min(family, key=train_ms_of)
        for family in families.values()
    ]


def _time(
    chosen: Iterable[Candidate], inputs: Inputs, rounds: int, device: torch.device
) -> dict[str, Any]:
    calls: dict[str, Callable[[], object]] = {}
    if inputs.shape.logits_bytes <= WHOLE_LOGITS_BYTES:
        calls["three GEMMs"], calls["first GEMM"] = bare_gemms(inputs)
        calls["three GEMMs"]()  # its buffers are touched for the first time here
    for candidate in chosen:
        calls[f"{candidate.key} train"] = partial(train, candidate, inputs)
        calls[f"{candidate.key} forward"] = partial(forward, candidate, inputs)
    return interleaved(calls, rounds, device)


def _peaks(
    candidate: Candidate, shape: Shape, device: torch.device, say: Callable[[str], None]
) -> dict[str, float]:
    try:
        return peak_mib(candidate, shape, device)
    except MemoryUnknownError as error:
        say(f"peak memory of {candidate.key} is unknown: {error}")
        return {}
