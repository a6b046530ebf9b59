"""Part 5: other ways to the same loss, where they are installed, a process for each package."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpu_parts.loss import errors_of, shapes
from gpu_parts.measure import bare_gemms, interleaved, make_problem, peak_mib, summary
from gpu_parts.record import Record
from npo_fast.bench.candidates import OURS, Candidate, find_candidates
from npo_fast.bench.fp64_oracle import Oracle, npo
from npo_fast.bench.inputs import Inputs
from npo_fast.bench.loss import check
from npo_fast.bench.memory import train

# by job: the names in npo_fast.bench.candidates
PEERS = {"pytorch": ("plain", "torch-lce"), "liger": ("liger",), "cce": ("cce",), "trl": ("trl",)}
CCE = ("cce", "cce_exact")


def run(record: Record, device: torch.device, tiny: bool, job: str) -> None:
    shape = shapes(tiny)[0]
    found = candidates(record, job, device)
    if all(one.peer == OURS for one in found):
        return
    inputs = make_problem(shape, device)
    oracle = Oracle(inputs)
    calls: dict[str, Callable[[], object]] = {"three GEMMs": bare_gemms(inputs).three}
    for one in found:
        name = one.key
        errors = record.attempt(f"{job}: {name}", partial(check, one, inputs, oracle))
        if errors is None:
            continue
        calls[name] = partial(train, one, inputs)
        memory = peak_mib(calls[name], device, shape.gradients_bytes)
        record.row(f"{job} {shape.name}", name, **errors_of(errors), **memory)
    times = interleaved(calls, device, tiny, seconds=6)
    for name, own in times.items():
        values = {**summary(own), "over_gemms": own.ratio_to(times["three GEMMs"])}
        record.row(f"{job} {shape.name}", name, **values)


def candidates(record: Record, job: str, device: torch.device) -> list[Candidate]:
    """Ours, and those of the packages of this job; why others are missing is recorded."""
    found, missing = find_candidates(device, PEERS[job])
    for peer, why in missing.items():
        record.error(peer, why)
    if job == "cce" and "cce" not in missing and device.type == "cuda":
        found = [one for one in found if one.peer == OURS] + [_cce(name) for name in CCE]
    return found


def _cce(implementation: str) -> Candidate:
    """Without the variant by torch.compile, which takes long to compile."""

    def run(inputs: Inputs) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        losses = linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.labels, reduction="none", impl=implementation
        )
        return npo(-losses.float(), inputs)

    return Candidate("cce", "NPO", run, implementation)
