"""Versions of everything that can change a number."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from npo_fast._version import __version__


def versions() -> dict[str, str]:
    """Version of each package that can change a number, and the device."""
    numbers = {"npo_fast": __version__, "python": platform.python_version()}
    for package in (
        "torch", "transformers", "triton", "safetensors", "numpy", "scipy", "torchao", "peft",
        "bitsandbytes",
    ):  # fmt: skip
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            continue
    numbers["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return numbers
