"""Versions of everything that can change a number."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from npo_fast._version import __version__

PACKAGES = (
    "torch", "transformers", "triton", "safetensors", "numpy", "scipy", "torchao", "peft",
    "bitsandbytes",
)  # fmt: skip


def version_of(package: str) -> str | None:
    """Version of an installed package, else None; PyTorch's says which build (2.13.0+cu130)."""
    if package == "torch":
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Version of each package that can change a number, and the device."""
    numbers = {"npo_fast": __version__, "python": platform.python_version()}
    numbers |= {name: number for name in PACKAGES if (number := version_of(name))}
    numbers["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return numbers
