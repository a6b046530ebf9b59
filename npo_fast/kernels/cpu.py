"""The C++ kernels of csrc for the CPU: loading the library registers them over the reference.

Without a library the reference serves the CPU. A library that does not load is an error, never a
silent fallback.
"""

from pathlib import Path

import torch


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
