"""Peak memory of one call, without its inputs and outputs.

On a GPU PyTorch counts it. On a CPU Linux does: writing 5 to ``/proc/self/clear_refs`` resets the
high-water mark of the resident set (VmHWM). The call runs in a fresh process, where it cannot reuse
memory that was freed before: ``python -m npo_fast.bench.memory REQUEST``.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

import npo_fast
from npo_fast.bench.candidates import Candidate, candidate_by_key
from npo_fast.bench.inputs import Inputs, Shape, make_inputs

MIB = 1 << 20


class MemoryUnknownError(Exception):
    """Raised where the system or the process does not report its memory."""


def train(candidate: Candidate, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Loss and both gradients."""
    loss = candidate.run(inputs)
    return loss, *torch.autograd.grad(loss, (inputs.hidden, inputs.weight))


def forward(candidate: Candidate, inputs: Inputs) -> torch.Tensor:
    """The loss alone."""
    with torch.no_grad():
        return candidate.run(inputs)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``call`` held at a time, results included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _high_water_bytes()
    except OSError as error:
        raise MemoryUnknownError(f"no high-water mark of the resident set: {error}") from error
    call()
    return _high_water_bytes() - before


def peak_mib(candidate: Candidate, shape: Shape, device: torch.device) -> dict[str, float]:
    """Peaks beyond the outputs of ``train`` and ``forward``, each in MiB, in a fresh process."""
    request = {"candidate": candidate.key, "shape": asdict(shape), "device": device.type}
    root = Path(npo_fast.__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    # large blocks are mapped one by one: freed ones return to the system and count when reused
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(
        [sys.executable, "-m", "npo_fast.bench.memory", json.dumps(request)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MemoryUnknownError(f"exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _high_water_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise MemoryUnknownError("/proc/self/status has no VmHWM")


def _measure(request: dict) -> dict[str, float]:
    device = torch.device(request["device"])
    shape = Shape(**request["shape"])
    candidate = candidate_by_key(request["candidate"], device)
    small = make_inputs(replace(shape, rows=8, vocabulary=512, sequences=2), "random", device)
    train(candidate, small)  # warm-up: libraries, threads and compiled code do not count
    forward(candidate, small)
    inputs = make_inputs(shape, "random", device)
    forward_bytes = peak_bytes(lambda: forward(candidate, inputs), device)
    train_bytes = peak_bytes(lambda: train(candidate, inputs), device) - shape.gradients_bytes
    return {"train_peak_mib": train_bytes / MIB, "forward_peak_mib": forward_bytes / MIB}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
