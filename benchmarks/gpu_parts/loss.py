"""Part 2: loss and gradients by every path of the library, beside the bare GEMMs."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_parts.measure import (
    TOKENS_PER_SEQUENCE,
    bare_gemms,
    free_memory,
    interleaved,
    make_problem,
    peak_mib,
    profile,
    summary,
)
from gpu_parts.record import Record
from npo_fast import NPO, linear_kl, linear_sequence_loss
from npo_fast.bench.candidates import OURS, Candidate
from npo_fast.bench.fp64_oracle import TOLERANCE, Oracle
from npo_fast.bench.inputs import BETA, Inputs, Shape
from npo_fast.bench.loss import check
from npo_fast.bench.memory import forward, train

# rows, width, vocabulary; some odd, and more rows than the gradient of the head has room for
SIZES = (
    (4096, 4096, 128256), (8192, 4096, 32000), (2048, 2048, 151936), (2048, 4096, 50257),
    (3999, 4096, 128256), (16384, 4096, 32000),
)  # fmt: skip
TINY_SIZES = ((96, 64, 512), (128, 64, 256), (64, 32, 384), (64, 64, 257), (61, 64, 300))

# arguments of ``linear_sequence_loss`` by the name of the path; new ones are added here
PATHS: dict[str, dict[str, Any]] = {
    "default": {},
    "no logits": {"chunk_rows": 0},
    "chunks of 1024": {"chunk_rows": 1024},
}
TINY_PATHS = {**PATHS, "chunks of 1024": {"chunk_rows": 32}}
DEFAULT = "default"
PROFILED = 8  # kernels of the default path that are listed
KL_ROWS = 256  # whose logits are alive in fp64 at a time


def shapes(tiny: bool) -> list[Shape]:
    return [
        Shape(f"N={n} D={d} V={v}", n, d, v, max(1, n // TOKENS_PER_SEQUENCE), "bfloat16")
        for n, d, v in (TINY_SIZES if tiny else SIZES)
    ]


def run(record: Record, device: torch.device, tiny: bool, job: str) -> None:
    first, *others = shapes(tiny)
    record.attempt(first.name, lambda: one_shape(record, first, device, tiny))
    free_memory(device)
    record.attempt("linear_kl", lambda: one_kl(record, first, device, tiny))
    for shape in others:
        free_memory(device)
        record.attempt(shape.name, partial(one_shape, record, shape, device, tiny))


def candidate(path: str, arguments: dict[str, Any], frozen: bool = False) -> Candidate:
    def run(inputs: Inputs) -> Tensor:
        return linear_sequence_loss(
            inputs.hidden, inputs.weight.detach() if frozen else inputs.weight, inputs.labels,
            inputs.cu_seqlens, NPO(BETA), ref_log_probs=inputs.ref_log_probs, **arguments,
        )[0]  # fmt: skip

    return Candidate(OURS, "NPO", run, path)


def one_shape(record: Record, shape: Shape, device: torch.device, tiny: bool) -> None:
    inputs = make_problem(shape, device)
    oracle = Oracle(inputs)
    gemms = bare_gemms(inputs)
    calls: dict[str, Callable[[], object]] = {"three GEMMs": gemms.three}
    outputs_bytes = shape.gradients_bytes
    for path, arguments in (TINY_PATHS if tiny else PATHS).items():
        own = candidate(path, arguments)
        errors = record.attempt(f"{shape.name}: {path}", partial(check, own, inputs, oracle))
        if errors is None:
            continue
        record.row(shape.name, path, **errors_of(errors))
        calls[path] = partial(train, own, inputs)
        record.row(shape.name, path, **peak_mib(calls[path], device, outputs_bytes))
        if path == DEFAULT:
            calls["default, forward alone"] = partial(forward, own, inputs)
    frozen = partial(train_frozen, candidate(DEFAULT, {}, frozen=True), inputs)
    error = record.attempt(f"{shape.name}: frozen head", lambda: check_frozen(frozen, oracle))
    if error is not None:
        calls |= {"two GEMMs": gemms.two, "frozen head": frozen}
        beyond = peak_mib(frozen, device, inputs.hidden.nbytes)
        record.row(shape.name, "frozen head", error_hidden=error, **beyond)
    times = interleaved(calls, device, tiny)
    if DEFAULT in calls:
        table = f"profile of the default path, {shape.name}"
        record.attempt(table, lambda: profile(record, table, calls[DEFAULT], device, PROFILED))
    for name, own_times in times.items():
        floor = "two GEMMs" if name in ("two GEMMs", "frozen head") else "three GEMMs"
        flops = shape.gemm_flops * (2 if floor == "two GEMMs" else 3)
        values = summary(own_times)
        if "forward" not in name:
            values["over_gemms"] = own_times.ratio_to(times[floor])
            values["tflop_per_s"] = flops / own_times.median_ms / 1e9
        record.row(shape.name, name, **values)


def errors_of(errors: Any) -> dict[str, float]:
    short = {"loss": "loss", "hidden_gradient": "hidden", "weight_gradient": "weight"}
    return {f"error_{short[name]}": value for name, value in asdict(errors).items()}


def train_frozen(own: Candidate, inputs: Inputs) -> tuple[Tensor, Tensor]:
    loss = own.run(inputs)
    return loss, *torch.autograd.grad(loss, (inputs.hidden,))


def check_frozen(call: Callable[[], tuple[Tensor, Tensor]], oracle: Oracle) -> float:
    """The error of the hidden gradient; nothing is asked of the weight's."""
    loss, d_hidden = call()
    errors = oracle.errors("NPO", loss, d_hidden, torch.zeros_like(oracle.inputs.weight))
    if not max(errors.loss, errors.hidden_gradient) <= TOLERANCE["bfloat16"]:
        raise AssertionError(f"wrong: {errors}")
    return errors.hidden_gradient


def one_kl(record: Record, shape: Shape, device: torch.device, tiny: bool) -> None:
    """``linear_kl`` with a reference that is close to the model, beside four GEMMs."""
    inputs = make_problem(shape, device)
    hidden, weight = inputs.hidden, inputs.weight
    with torch.no_grad():
        ref_hidden = hidden + 0.3 * torch.randn_like(hidden)
        ref_weight = weight + 0.3 * shape.width**-0.5 * torch.randn_like(weight)

    def run() -> tuple[Tensor, ...]:
        kl = linear_kl(hidden, weight, ref_hidden, ref_weight)
        return kl, *torch.autograd.grad(kl, (hidden, weight))

    table = f"linear_kl {shape.name}"
    right = kl_truth(hidden.detach(), weight.detach(), ref_hidden, ref_weight)
    errors = check_kl(run(), right)
    record.row(table, DEFAULT, **errors)
    del right
    free_memory(device)
    record.row(table, DEFAULT, **peak_mib(run, device, shape.gradients_bytes))
    gemms = bare_gemms(inputs)
    ref_logits = ref_hidden @ ref_weight.T

    def four() -> None:
        gemms.three()
        torch.mm(ref_hidden, ref_weight.T, out=ref_logits)

    times = interleaved({"four GEMMs": four, DEFAULT: run}, device, tiny)
    for name, own in times.items():
        record.row(table, name, **summary(own), over_gemms=own.ratio_to(times["four GEMMs"]))


def kl_truth(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In fp64: the mean KL, its gradient in hidden and in some rows of the head, and which."""
    rows, vocabulary = len(hidden), len(weight)
    columns = torch.linspace(0, vocabulary - 1, min(vocabulary, 32), device=hidden.device).long()
    wide, ref_wide = weight.double(), ref_weight.double()
    total = hidden.new_zeros((), dtype=torch.float64)
    d_hidden = torch.empty_like(hidden, dtype=torch.float64)
    d_columns = wide.new_zeros(len(columns), hidden.shape[1])
    for first in range(0, rows, KL_ROWS):
        block = slice(first, first + KL_ROWS)
        log_p = (hidden[block].double() @ wide.T).log_softmax(-1)
        ref_log_p = (ref_hidden[block].double() @ ref_wide.T).log_softmax(-1)
        p, ref_p = log_p.exp(), ref_log_p.exp()
        total += (ref_p * (ref_log_p - log_p)).sum()
        gradient = (p - ref_p) / rows
        d_hidden[block] = gradient @ wide
        d_columns += gradient[:, columns].T @ hidden[block].double()
    return total / rows, d_hidden, d_columns, columns


def check_kl(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> dict[str, float]:
    kl, d_hidden, d_weight = found
    true_kl, true_hidden, true_columns, columns = right
    pairs = {
        "loss": (kl.detach(), true_kl),
        "hidden": (d_hidden, true_hidden),
        "weight": (d_weight[columns], true_columns),
    }
    errors = {
        f"error_{name}": float((value.double() - expected).norm() / expected.norm())
        for name, (value, expected) in pairs.items()
    }
    if not max(errors.values()) <= TOLERANCE["bfloat16"]:
        raise AssertionError(f"wrong: {errors}")
    return errors
