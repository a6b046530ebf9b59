"""The C++ kernels of csrc for the CPU: loading the library registers them over the reference.

Without a library the reference serves the CPU, and the first call says so. A library that does not
load is an error.
"""

import logging
import sys
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def library_path() -> Path | None:
    """Returns the library built from csrc, beside this file, or None."""
    return next(iter(sorted(Path(__file__).parent.glob("_cpu*.so"))), None)


def load() -> None:
    """Loads the library; raises ImportError where it exists and does not load."""
    path = library_path()
    try:
        if path is not None:
            torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"the C++ kernels {path} do not load under PyTorch {torch.__version__}: {error}. "
            "Rebuild them (`pip install --force-reinstall --no-deps npo-fast`, or in a checkout "
            "`python setup.py build_ext --inplace`), or delete the file to run without them"
        ) from error


@cache
def tell_if_absent() -> None:
    """Says once a process that there is no library, and how to get one, where it can be built."""
    if library_path() is None and sys.platform in ("linux", "darwin"):
        logger.warning(
            "the C++ kernels are not built, and plain PyTorch does their work on the CPU, slower: "
            "install a C++ compiler (g++ or clang++), then `pip install --force-reinstall "
            "--no-deps npo-fast` (in a checkout `NPO_FAST_BUILD=1 python setup.py build_ext "
            "--inplace`)"
        )
