"""The C++ kernels of csrc for the CPU: loading them registers them over the reference.

An absent library leaves the reference in charge; a library that is there and does not load is an
error, never a silent fallback.
"""

from pathlib import Path

import torch


def library_path() -> Path | None:
    """The library built from csrc, beside this file; None where there is none."""
    return next(iter(sorted(Path(__file__).parent.glob("_cpu*.so"))), None)


def load() -> None:
    path = library_path()
    if path is None:
        return
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"the C++ kernels {path} do not load under PyTorch {torch.__version__}: {error}. "
            "Rebuild them (`pip install --force-reinstall --no-deps npo-fast`, or in a checkout "
            "`python setup.py build_ext --inplace`), or delete the file to run without them"
        ) from error
