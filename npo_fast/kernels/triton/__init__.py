"""Triton kernels for NVIDIA and AMD GPUs: one kernel and its launcher a file, no autograd.

``registration`` plugs them into the operators without importing Triton; ``config`` holds what is
tuned a target; ``offline`` compiles everything for GPUs that are not there and inspects it.
"""
