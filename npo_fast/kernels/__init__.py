"""Kernels behind ``torch.library`` operators.

``operators`` declares the operators, and ``reference`` serves every device with plain PyTorch: it
is the specification. A faster kernel registers itself for its device, and nothing above changes.
"""

from importlib.util import find_spec

from npo_fast.kernels import cpu
from npo_fast.kernels.operators import OPERATORS

__all__ = ["OPERATORS"]

cpu.load()
if find_spec("triton") is not None:
    from npo_fast.kernels.triton import registration as registration
