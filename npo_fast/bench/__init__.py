"""Time and memory of the fused losses and their kernels, beside other implementations.

``inputs`` makes the problems, ``candidates`` lists the implementations, ``fp64_oracle`` checks
their results, ``memory`` and ``timing`` measure; ``loss``, ``scaling`` and ``kernels`` report.
"""
