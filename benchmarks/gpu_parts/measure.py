"""Times by CUDA events, variants in turn, and problems that need no operator of ours to be made."""

import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_parts.record import Record
from npo_fast.bench.inputs import Inputs, Shape
from npo_fast.bench.memory import MIB, MemoryUnknownError, peak_bytes
from npo_fast.bench.timing import Times

Call = Callable[[], object]
ROUNDS, LEAST_ROUNDS, WARM_UP = 25, 3, 2
# A kernel that only waits goes first, so that the GPU never waits for the host at the start of a
# call: about a millisecond
SLEEP_CYCLES = 1_500_000
TOKENS_PER_SEQUENCE = 64
LOGITS_BYTES = 512 << 20
ALIGNED = 64  # elements: fast GEMMs want rows of logits to begin at multiples of those
KERNEL_CHARACTERS = 90  # of a name that templates make long


@dataclass(frozen=True)
class Prepared:
    """A call that uses up its inputs, and what restores them, outside the time."""

    prepare: Call
    call: Call


def interleaved(
    calls: Mapping[str, Call | Prepared],
    device: torch.device,
    tiny: bool = False,
    seconds: float = 8.0,
    rounds: int = ROUNDS,
) -> dict[str, Times]:
    """Times of every call, round by round, after rounds that warm up.

    Each round begins with another call. Rounds end early when ``seconds`` are over.
    """
    warm_up, rounds = (1, 2) if tiny else (WARM_UP, rounds)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    started = time.monotonic()
    for done in range(warm_up + rounds):
        first = done % max(1, len(names))
        found = _round({name: calls[name] for name in names[first:] + names[:first]}, device)
        if done >= warm_up:
            for name, time_ms in found.items():
                times[name].append(time_ms)
        if done + 1 >= warm_up + LEAST_ROUNDS and time.monotonic() - started > seconds:
            break
    return {name: Times(found) for name, found in times.items()}


def _round(calls: Mapping[str, Call | Prepared], device: torch.device) -> dict[str, float]:
    times, events = {}, {}
    for name, one in calls.items():
        call = one
        if isinstance(one, Prepared):
            one.prepare()
            call = one.call
        if device.type != "cuda":
            started = time.perf_counter()
            call()
            times[name] = 1e3 * (time.perf_counter() - started)
            continue
        events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(SLEEP_CYCLES)
        events[name][0].record()
        call()
        events[name][1].record()
    synchronize(device)
    return times | {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def summary(times: Times) -> dict[str, float]:
    return {"ms": times.median_ms, "min_ms": min(times.times_ms), "rounds": len(times.times_ms)}


def peak_mib(
    call: Call, device: torch.device, outputs_bytes: int | None = None
) -> dict[str, float]:
    """Peak of a call that has run before, and beyond its outputs; empty where unknown."""
    try:
        peak = peak_bytes(call, device)
    except MemoryUnknownError:
        return {}
    if outputs_bytes is None:
        return {"peak_mib": peak / MIB}
    return {"peak_mib": peak / MIB, "beyond_outputs_mib": (peak - outputs_bytes) / MIB}


def profile(record: Record, table: str, call: Call, device: torch.device, most: int) -> None:
    """The kernels of one call by the time they take; on a CPU its operators."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, *([kinds.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        started = time.perf_counter()
        call()
        synchronize(device)
        wall_ms = 1e3 * (time.perf_counter() - started)
    events, field = list(profiler.key_averages()), "self_cpu_time_total"
    if device.type == "cuda":
        field = "self_device_time_total"
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    own_ms: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if not getattr(event, "is_user_annotation", False):  # spans of other kernels
            name = event.key.replace("(anonymous namespace)::", "").replace("at::native::", "")
            own_ms[name[:KERNEL_CHARACTERS]] += getattr(event, field) / 1e3
            calls[name[:KERNEL_CHARACTERS]] += event.count
    record.row(table, "all", ms=own_ms.total(), calls=calls.total(), wall_ms=wall_ms)
    for name, ms in own_ms.most_common(most):
        record.row(table, name, ms=ms, calls=calls[name])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def make_problem(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Random logits; the reference is what plain PyTorch makes of them, give or take one nat."""
    random = torch.Generator(device).manual_seed(seed)
    options = {"dtype": shape.torch_dtype, "device": device}
    weight = torch.empty(shape.vocabulary, shape.width, **options)
    weight.normal_(std=shape.width**-0.5, generator=random)
    hidden = torch.empty(shape.rows, shape.width, **options).normal_(generator=random)
    labels = torch.randint(shape.vocabulary, (shape.rows,), generator=random, device=device)
    lengths = sequence_lengths(shape)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()  # on the CPU, as a trainer has it
    sequence_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
    log_probs = plain_log_probs(hidden, weight, labels)
    ref = log_probs.new_zeros(len(lengths)).index_add_(0, sequence_of, log_probs)
    ref += torch.empty_like(ref).normal_(generator=random)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    return Inputs(shape, hidden, weight, labels, cu_seqlens, sequence_of, ref)


def sequence_lengths(shape: Shape) -> list[int]:
    """Between half and one and a half times the mean."""
    mean = shape.rows // shape.sequences
    lengths = [max(1, mean + (37 * i) % (mean + 1) - mean // 2) for i in range(shape.sequences - 1)]
    while sum(lengths) >= shape.rows:
        lengths[lengths.index(max(lengths))] -= 1
    return [*lengths, shape.rows - sum(lengths)]


@torch.no_grad()
def plain_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:  # (N,) fp32
    rows = max(1, LOGITS_BYTES // (4 * len(weight)))
    parts = []
    for block, own in zip(hidden.split(rows), labels.split(rows), strict=True):
        log_probs = (block @ weight.T).float().log_softmax(-1)
        parts.append(log_probs.gather(1, own[:, None]).squeeze(1))
    return torch.cat(parts)


@dataclass(frozen=True)
class Gemms:
    """The three GEMMs that every method needs, into existing buffers.

    Rows of logits are padded where the vocabulary is odd, without which they take several times as
    long: a floor does the best there is.
    """

    first: Call
    second: Call
    third: Call

    def two(self) -> None:
        self.first()
        self.second()

    def three(self) -> None:
        self.two()
        self.third()


def bare_gemms(inputs: Inputs) -> Gemms:
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    stride = -(-len(weight) // ALIGNED) * ALIGNED
    logits = hidden.new_empty(len(hidden), stride)[:, : len(weight)]
    torch.mm(hidden, weight.T, out=logits)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    return Gemms(
        lambda: torch.mm(hidden, weight.T, out=logits),
        lambda: torch.mm(logits, weight, out=d_hidden),
        lambda: torch.mm(logits.T, hidden, out=d_weight),
    )
