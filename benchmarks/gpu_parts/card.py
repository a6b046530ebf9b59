"""Part 0: which card it is, and what it does at best."""

import torch

from gpu_parts.loss import shapes
from gpu_parts.measure import bare_gemms, interleaved, make_problem, summary
from gpu_parts.record import Record
from npo_fast.bench.timing import Times


def run(record: Record, device: torch.device, tiny: bool, job: str) -> None:
    if device.type == "cuda":
        record.attempt("properties", lambda: _properties(record))
    record.attempt("copy", lambda: _copy(record, device, tiny))
    record.attempt("square GEMM", lambda: _square(record, device, tiny))
    record.attempt("three GEMMs", lambda: _three(record, device, tiny))


def _properties(record: Record) -> None:
    card = torch.cuda.get_device_properties(0)
    record.row("versions", "CUDA of PyTorch", version=torch.version.cuda)
    record.row("versions", "cuDNN", version=str(torch.backends.cudnn.version()))
    record.row(
        "card",
        card.name,
        capability=f"{card.major}.{card.minor}",
        processors=card.multi_processor_count,
        memory_gib=card.total_memory / 2**30,
        l2_mib=getattr(card, "L2_cache_size", 0) / 2**20,
    )


def _copy(record: Record, device: torch.device, tiny: bool) -> None:
    source = torch.randn(1 << (16 if tiny else 29), device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, tiny, seconds=2)["copy"]
    name = f"copy of {source.nbytes / 2**20:.3g} MiB, read and written"
    record.row("rates", name, **summary(times), gb_per_s=2 * source.nbytes / times.median_ms / 1e6)


def _square(record: Record, device: torch.device, tiny: bool) -> None:
    size = 128 if tiny else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times = interleaved({"mm": lambda: torch.mm(a, b, out=out)}, device, tiny, seconds=2)["mm"]
    record.row("rates", f"GEMM {size} cubed, bf16", **summary(times), **_rate(size**3, times))


def _three(record: Record, device: torch.device, tiny: bool) -> None:
    shape = shapes(tiny)[0]
    gemms = bare_gemms(make_problem(shape, device))
    calls = {
        "GEMM 1, hidden @ weight.T": gemms.first,
        "GEMM 2, logits @ weight": gemms.second,
        "GEMM 3, logits.T @ hidden": gemms.third,
    }
    products = shape.rows * shape.width * shape.vocabulary
    for name, times in interleaved(calls, device, tiny, seconds=3).items():
        record.row("rates", f"{name} of {shape.name}", **summary(times), **_rate(products, times))


def _rate(products: float, times: Times) -> dict[str, float]:
    return {"tflop_per_s": 2 * products / times.median_ms / 1e9}
