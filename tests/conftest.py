"""Settings that must stand before the first import of Triton."""

import os

import torch

if not torch.cuda.is_available():
    # kernels run on the CPU, in Triton's interpreter; what compiles does so in a process of its own
    os.environ["TRITON_INTERPRET"] = "1"
