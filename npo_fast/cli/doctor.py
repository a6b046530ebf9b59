"""``npo-fast doctor``: what is here, which kernel serves which operator, what is missing."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch

import npo_fast.kernels
from npo_fast import tables
from npo_fast.cli.console import Output
from npo_fast.kernels import cpu
from npo_fast.model.choice import Demands, attentions, machine_of
from npo_fast.versions import version_of

PACKAGES = (
    "torch", "triton", "transformers", "datasets", "safetensors", "numpy", "scipy", "rouge-score",
    "tyro", "matplotlib",
)  # fmt: skip
OPTIONAL = {
    "flash-attn": ("flash_attn", "FlashAttention on packs", "pip install 'npo-fast[flash-attn]'"),
    "gguf": ("gguf", "GGUF files as --model", "pip install 'npo-fast[gguf]'"),
    "accelerate": ("accelerate", "GGUF files as --model", "pip install 'npo-fast[gguf]'"),
    "peft": ("peft", "LoRA", "pip install 'npo-fast[lora]'"),
    "bitsandbytes": ("bitsandbytes", "quantised weights", "pip install 'npo-fast[quant]'"),
    "lm-eval": ("lm_eval", "evaluate --lm-eval", "pip install 'npo-fast[lm-eval]'"),
}


@dataclass(frozen=True)
class Command:
    """The doctor takes no options of its own."""


def run(command: Command) -> Output:
    """Examines the installation; returns what it finds."""
    findings = examine()
    return Output(findings, report(findings))


def examine() -> dict[str, Any]:
    """Everything that decides what npo-fast can do here."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    missing = {
        name: {"for": use, "get": cure}
        for name, (module, use, cure) in OPTIONAL.items()
        if importlib.util.find_spec(module) is None
    }
    if not gpus:
        missing.pop("flash-attn", None)
    library = cpu.library_path()
    return {
        "versions": {"npo_fast": npo_fast.__version__, **{p: version_of(p) for p in PACKAGES}},
        "optional": {name: v for name in OPTIONAL if (v := version_of(name)) is not None},
        "devices": ["cpu", *(f"{gpu} {torch.cuda.get_device_name(gpu)}" for gpu in gpus)],
        "cpu": {
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "attention": {device: attention(device) for device in ("cpu", *gpus)},
        "kernels": {name: kernels(name) for name in npo_fast.kernels.OPERATORS},
        "compiler": shutil.which("c++") or shutil.which("g++"),
        "cpu_library": None if library is None else str(library),
        "missing": missing,
    }


def attention(device: str) -> str:
    """Which attention a bf16 model with heads of 128 gets on a device."""
    return next(attentions(machine_of(torch.device(device)), torch.bfloat16, Demands()))


def kernels(operator: str) -> dict[str, str]:
    """Which kernel serves an operator, by device."""
    return {
        device: fast
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"npo_fast::{operator}", key)
        else "reference (PyTorch)"
        for device, key, fast in (("cpu", "CPU", "C++"), ("cuda", "CUDA", "Triton"))
    }


def report(findings: dict[str, Any]) -> str:
    """The findings as text."""
    versions = findings["versions"] | findings["optional"]
    lines = [
        "Versions",
        *(f"  {name:<14}{value or 'not installed'}" for name, value in versions.items()),
        "",
        "Devices",
        *(f"  {device}" for device in findings["devices"]),
        "  {threads} threads on {cores} cores, {instructions}".format(**findings["cpu"]),
        f"  compiler: {findings['compiler'] or 'none'}",
        "",
        "Attention (of a bf16 model, heads of 128)",
        *(f"  {device:<14}{name}" for device, name in findings["attention"].items()),
        "",
        "Kernels",
        tables.plain(
            ([f"  {name}", on["cpu"], on["cuda"]] for name, on in findings["kernels"].items()),
            ("  operator", "cpu", "cuda"),
        ),
    ]
    if findings["cpu_library"] is None:
        lines += [
            "",
            "C++ kernels are not built. With PyTorch and a C++ compiler installed:",
            "  pip install --force-reinstall --no-deps npo-fast   (in a checkout: .)",
        ]
    if findings["missing"]:
        lines += ["", "Not installed (only needed for what stands beside it)"]
        lines += [f"  {n:<14}{m['for']}: {m['get']}" for n, m in findings["missing"].items()]
    return "\n".join(lines)
