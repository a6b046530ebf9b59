"""``npo-fast doctor``: what is here, which kernel serves which operator, what is missing."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import npo_fast.kernels
from npo_fast import tables
from npo_fast.cli.console import show
from npo_fast.cli.settings import Common
from npo_fast.kernels import cpu

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
}


@dataclass(frozen=True)
class Command:
    """The doctor takes no options of its own."""


def run(command: Command, common: Common) -> None:
    """Examines the installation and prints what it finds."""
    findings = examine()
    show(findings, report(findings), common.json)


def examine() -> dict[str, Any]:
    """Everything that decides what npo-fast can do here."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [
            f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
        ]
    missing = {
        name: {"for": use, "get": cure}
        for name, (module, use, cure) in OPTIONAL.items()
        if importlib.util.find_spec(module) is None
    }
    if not torch.cuda.is_available():
        missing.pop("flash-attn", None)
    return {
        "versions": {"npo_fast": npo_fast.__version__, **{p: _version(p) for p in PACKAGES}},
        "optional": {name: v for name in OPTIONAL if (v := _version(name)) is not None},
        "devices": devices,
        "cpu": {
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "attention": attention(),
        "kernels": kernels(),
        "compiler": shutil.which("c++") or shutil.which("g++"),
        "cpu_library": None if (library := cpu.library_path()) is None else str(library),
        "missing": missing,
    }


def attention() -> dict[str, str]:
    """Which attention a bf16 model with heads of 128 gets, by device."""
    from npo_fast.model.choice import Demands, attentions, machine_of

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    devices = ["cpu", *(f"cuda:{i}" for i in gpus)]
    return {
        device: next(attentions(machine_of(torch.device(device)), torch.bfloat16, Demands()))
        for device in devices
    }


def kernels() -> dict[str, dict[str, str]]:
    """Which kernel serves each operator, by device."""
    return {
        name: {
            device: "reference (PyTorch)"
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"npo_fast::{name}", key)
            else fast
            for device, key, fast in (("cpu", "CPU", "C++"), ("cuda", "CUDA", "Triton"))
        }
        for name in npo_fast.kernels.OPERATORS
    }


def report(findings: dict[str, Any]) -> str:
    """The findings as text."""
    processor = findings["cpu"]
    lines = [
        "Versions",
        *(
            f"  {name:<14}{value or 'not installed'}"
            for name, value in findings["versions"].items()
        ),
        *(f"  {name:<14}{value}" for name, value in findings["optional"].items()),
        "",
        "Devices",
        *(f"  {device}" for device in findings["devices"]),
        "  {threads} threads on {cores} cores, {instructions}".format(**processor),
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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
