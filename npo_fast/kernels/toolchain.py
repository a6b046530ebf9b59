"""What building the C++ kernels of csrc takes, and what of it is missing here.

``setup.py`` runs this file by its path, before the package and PyTorch are installed: it imports
the standard library only.
"""

import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

TORCH_MINIMUM = (2, 10)  # the first stable C++ ABI with parallel_for


def find_torch() -> Path | None:
    """Returns the folder of the installed torch package, or None.

    A build frontend isolates a build in an environment of its own, without torch. pip keeps the
    interpreter, so ``sysconfig`` names the site-packages around it; ``python -m build`` and ``uv``
    do not, but an activated environment stands on the PATH.
    """
    folders = (path / "torch" for path in _site_packages())
    return next((folder for folder in folders if (folder / "version.py").is_file()), None)


def _site_packages() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parents[1]
    yield from (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    for binaries in map(Path, os.get_exec_path()):
        if (binaries.parent / "pyvenv.cfg").is_file():
            yield from sorted(binaries.parent.glob("lib/python3*/site-packages"))


def torch_version(torch: Path) -> tuple[int, int]:
    """Returns major and minor version of a torch package, or zeros."""
    found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", (torch / "version.py").read_text())
    return (int(found[1]), int(found[2])) if found else (0, 0)


def compiler() -> str:
    """Returns the C++ compiler that setuptools will call."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    return str(shlex.split(command)[0])


def obstacle() -> str | None:
    """Returns why the kernels cannot be built here and what to do about it, or None."""
    minimum = ".".join(map(str, TORCH_MINIMUM))
    if sys.platform not in ("linux", "darwin"):
        return f"they are built on Linux and macOS, not on {sys.platform}"
    torch = find_torch()
    if torch is None:
        return "PyTorch is not installed; `pip install torch` first, then install npo-fast again"
    if torch_version(torch) < TORCH_MINIMUM:
        return f"{torch} is older than PyTorch {minimum}; upgrade it, then install npo-fast again"
    if not (torch / "include" / "torch" / "csrc" / "stable" / "ops.h").is_file():
        return f"{torch} has no C++ headers; use a PyTorch wheel, then install npo-fast again"
    if shutil.which(compiler()) is None:
        return f"{compiler()!r} is not found; install g++ or clang++, then install npo-fast again"
    return None
