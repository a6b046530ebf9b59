"""``npo-fast doctor``: what is installed, what serves which operator, what is missing, its cure."""

import os
import platform
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import npo_fast.kernels
from npo_fast import tables
from npo_fast.cli.console import Output
from npo_fast.cli.requirements import Need, needs, own_requirements
from npo_fast.errors import first_line
from npo_fast.kernels import cpu, toolchain

# What each extra of pyproject.toml brings
EXTRAS = {
    "lora": "LoRA adapters: --lora-rank",
    "quant": "4-bit weights under an adapter (QLoRA): --quantize 4bit",
    "optim": "optimizers with small states: --optimizer adamw-8bit, adamw-bf16",
    "gguf": "GGUF files as --model",
    "hf-trainer": "UnlearningTrainer, a transformers.Trainer that unlearns",
    "track": "TensorBoard logs: --track tensorboard",
    "lm-eval": "tasks of lm-evaluation-harness: evaluate --lm-eval",
    "flash-attn": "FlashAttention on NVIDIA GPUs",
    "peers": "other libraries' losses beside these: bench loss",
}
FOR_DEVELOPERS = {
    "test": "the tests of the repository",
    "bench": "the benchmarks of the repository",
    "docs": "the documentation site",
    "dev": "tests, style and type checks",
}
NOT_INSTALLED = {
    "what": "npo-fast runs from its source folder: nothing says which versions it needs",
    "cure": "pip install -e .",
}
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
WIDTH = 80


@dataclass(frozen=True)
class Command:
    """The doctor takes no options of its own."""


def run(command: Command) -> Output:
    """Examines the installation; returns what it finds."""
    findings = examine()
    return Output(findings, report(findings))


def examine() -> dict[str, Any]:
    """Returns everything that decides what npo-fast can do here."""
    requirements = own_requirements()
    base = needs(requirements or ["torch", "transformers"])
    extras = {name: needs(requirements or [], name) for name in EXTRAS | FOR_DEVELOPERS}
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    useful = {name: extras[name] for name in EXTRAS if gpus or name != "flash-attn"}
    library = cpu.library_path()
    gpu = gpu_support()
    problems = [
        *version_problems(base, extras),
        *([] if requirements is not None else [NOT_INSTALLED]),
        *([] if library is not None else [kernel_problem()]),
        *([] if gpu["problem"] is None else [gpu["problem"]]),
    ]
    return {
        "versions": {
            "npo_fast": npo_fast.__version__,
            "python": platform.python_version(),
            **{need.package: need.installed for need in base},
        },
        "optional": {n.package: n.installed for n in _each(useful) if n.installed is not None},
        "devices": ["cpu", *(f"{gpu} {torch.cuda.get_device_name(gpu)}" for gpu in gpus)],
        "gpu": {name: gpu[name] for name in ("build", "driver", "obstacle")},
        "cpu": {
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "attention": {device: attention(device) for device in ("cpu", *gpus)},
        "kernels": {name: kernels(name) for name in npo_fast.kernels.OPERATORS},
        "compiler": shutil.which(toolchain.compiler()),
        "cpu_library": None if library is None else str(library),
        "extras": {
            name: {
                "for": use,
                "installed": bool(extras[name]) and all(n.is_met for n in extras[name]),
                "packages": {need.package: need.installed for need in extras[name]},
                "get": _pip(name),
            }
            for name, use in (EXTRAS | FOR_DEVELOPERS).items()
        },
        "missing": {
            need.package: {"for": EXTRAS[name], "get": _pip(name)}
            for name in reversed(useful)  # the first extra of several counts
            for need in useful[name]
            if need.installed is None
        },
        "problems": problems,
    }


def version_problems(base: Iterable[Need], extras: Mapping[str, list[Need]]) -> Iterator[dict]:
    """Yields packages that are missing or in a version outside of the range, and their cure."""
    for need in base:
        if not need.is_met:
            yield {
                "what": f"{need.package} {need.installed or 'is missing'}: "
                f"npo-fast needs {need.versions or 'any version'}",
                "cure": f"pip install '{need.package}{need.versions}'",
            }
    told = {need.package for need in base}
    for name, group in extras.items():
        for need in group:
            if not need.fits and need.package not in told:
                told.add(need.package)
                yield {
                    "what": f"{need.package} {need.installed}: npo-fast[{name}] needs "
                    f"{need.versions}",
                    "cure": _pip(name),
                }


def kernel_problem() -> dict[str, str]:
    """Returns why there are no C++ kernels, as far as it can be told, and how to get them."""
    obstacle = toolchain.obstacle()
    reason = "" if obstacle is None else f" They cannot be built: {obstacle}."
    return {
        "what": "The C++ kernels are not built. PyTorch does their work on the CPU, slower."
        + reason,
        "cure": "pip install --force-reinstall --no-deps npo-fast   (in a checkout: .)",
    }


def gpu_support() -> dict[str, Any]:
    """Returns what PyTorch is built for, the NVIDIA driver, and why no GPU can be used."""
    cuda, hip = torch.version.cuda, torch.version.hip
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
    driver = nvidia_driver()
    obstacle = problem = None
    if not torch.cuda.is_available():
        if build == "CPU":
            obstacle = "this PyTorch is built for CPUs only"
            cure = "install a PyTorch that is built for CUDA"
        else:
            obstacle = _cuda_error() or "none is visible (see CUDA_VISIBLE_DEVICES)"
            cure = "install an NVIDIA driver that fits, or a PyTorch for an older CUDA"
        if driver is not None:
            problem = {
                "what": f"NVIDIA driver {driver} is here, but no GPU can be used: {obstacle}",
                "cure": cure,
            }
    return {"build": build, "driver": driver, "obstacle": obstacle, "problem": problem}


def nvidia_driver() -> str | None:
    """Returns the version of the NVIDIA driver of this Linux machine, or None."""
    if not NVIDIA_DRIVER.is_file():
        return None
    found = re.search(r"\b\d{3}\.\d+(\.\d+)*\b", NVIDIA_DRIVER.read_text())
    return found[0] if found else "of an unknown version"


def _cuda_error() -> str | None:
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return first_line(error).partition(". ")[0]
    return None


def attention(device: str) -> str:
    """Returns which attention a bf16 model with heads of 128 gets on a device."""
    try:  # a transformers that is too old is a finding, not an error
        from npo_fast.model.choice import Demands, attentions, machine_of
    except ImportError as error:
        return f"unknown: {first_line(error)}"
    return next(attentions(machine_of(torch.device(device)), torch.bfloat16, Demands()))


def kernels(operator: str) -> dict[str, str]:
    """Returns which kernel serves an operator, by device."""
    return {
        device: fast
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"npo_fast::{operator}", key)
        else "reference (PyTorch)"
        for device, key, fast in (("cpu", "CPU", "C++"), ("cuda", "CUDA", "Triton"))
    }


def report(findings: dict[str, Any]) -> str:
    """Returns the findings as text, at most 80 columns wide but for long names."""
    problems, versions = findings["problems"], findings["versions"]
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    lines = [f"npo-fast {versions['npo_fast']}: {count if problems else 'no problem found'}"]
    for problem in problems:
        lines += ["", *_wrapped(problem["what"], "! "), f"  {problem['cure']}"]
    lines += [
        "",
        "Versions",
        *(f"  {name:<14}{value or 'not installed'}" for name, value in versions.items()),
        "",
        "Devices",
        *(f"  {device}" for device in findings["devices"]),
        "  {threads} threads on {cores} cores, {instructions}".format(**findings["cpu"]),
        *_wrapped(f"GPU: {_gpu_line(findings['gpu'])}"),
        f"  C++ kernels: {'built' if findings['cpu_library'] else 'not built'}; "
        f"compiler: {findings['compiler'] or 'none'}",
        "",
        "Attention (of a bf16 model, heads of 128)",
        *(f"  {device:<14}{name}" for device, name in findings["attention"].items()),
        "",
        "Kernels",
        tables.plain(
            ([f"  {name}", on["cpu"], on["cuda"]] for name, on in findings["kernels"].items()),
            ("  operator", "cpu", "cuda"),
        ),
        *_extra_lines(findings["extras"]),
    ]
    return "\n".join(lines)


def _gpu_line(gpu: Mapping[str, Any]) -> str:
    parts = [f"PyTorch for {gpu['build']}"]
    parts += [f"NVIDIA driver {gpu['driver']}"] if gpu["driver"] else []
    parts += [f"not usable: {gpu['obstacle']}"] if gpu["obstacle"] else []
    return ", ".join(parts)


def _extra_lines(extras: Mapping[str, Any]) -> Iterator[str]:
    ready = [name for name in EXTRAS if extras[name]["installed"]]
    if ready:
        yield from ("", "Extras that are installed")
        yield from (f"  {name:<12}{EXTRAS[name]}" for name in ready)
    if len(ready) < len(EXTRAS):
        yield from ("", "Extras that are not installed: what each brings, and the command")
        for name in EXTRAS:
            if name not in ready:
                yield f"  {name:<12}{EXTRAS[name]}"
                yield f"  {'':<12}{_pip(name)}"
    yield from ("", "For work on npo-fast itself, in a checkout")
    for name, use in FOR_DEVELOPERS.items():
        state = "installed" if extras[name]["installed"] else _pip(name, ".")
        yield f"  {name:<12}{use:<36}{state}"


def _wrapped(text: str, first: str = "  ") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent="  ", break_on_hyphens=False
    )


def _pip(extra: str, project: str = "npo-fast") -> str:
    return f"pip install '{project}[{extra}]'"


def _each(groups: Mapping[str, list[Need]]) -> Iterator[Need]:
    for group in groups.values():
        yield from group
