"""What the fused losses and their kernels cost, beside what else there is.

``inputs`` makes the problems, ``candidates`` lists who solves them, ``truth`` says in fp64 what
is right, ``memory`` and ``timing`` measure; ``loss``, ``scaling`` and ``kernels`` report.
"""
