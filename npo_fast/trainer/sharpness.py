"""Sharpness-aware steps: forgetting that nearby weights have too, so that little brings it back.

With ``L_f`` the sum of the terms that forget, and ``L_r`` of those that retain, a step is made of

    e = rho * g / |g|,  g = grad L_f(w)
    gradient = grad L_f(w + e) + grad L_r(w)

as in arXiv 2502.05374 (SAM, arXiv 2010.01412, on the forget loss alone): ``e`` stands for an
attacker who relearns, and what is to be kept needs no attacker. Where no term retains, or in
fine-tuning, it is SAM as it was published.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from npo_fast.methods import Term
from npo_fast.trainer.optimizers import global_norm, number_of, parameters_of
from npo_fast.trainer.state import random_state, set_random_state

Measured = tuple[dict[str, float], dict[str, float]]  # values of terms, mean log-probs of sources


def sharpness_aware(
    accumulate: Callable[[tuple[Term, ...]], Measured],
    terms: tuple[Term, ...],
    optimizer: torch.optim.Optimizer,
    rho: float,
    device: torch.device,
    copy_on_cpu: bool = False,
) -> Measured:
    """Leaves the gradient of the whole step in ``.grad``; returns what was measured at ``w``.

    Both passes over the forget data draw the same random numbers (dropout), and a baseline (KTO) is
    that of the weights of its pass. Weights are ``w`` again to the bit, whatever is raised.

    Args:
        accumulate: adds the gradient of terms over the whole step to ``.grad``.
        copy_on_cpu: whether the copy of the weights lies in CPU memory.
    """
    forget = tuple(term for term in terms if term.source != "retain")
    retain = tuple(term for term in terms if term.source == "retain")
    if not forget:  # an alternating step on the retain data
        return accumulate(retain)
    random_numbers = random_state(device)
    values, log_probs = accumulate(forget)
    with _perturbed(optimizer, rho, copy_on_cpu):
        set_random_state(random_numbers, device)
        accumulate(forget)
    if retain:
        retain_values, retain_log_probs = accumulate(retain)
        values, log_probs = values | retain_values, log_probs | retain_log_probs
    return values, log_probs


@contextmanager
def _perturbed(optimizer: torch.optim.Optimizer, rho: float, copy_on_cpu: bool) -> Iterator[None]:
    """Inside, weights are ``w + rho * g / |g|``, with the gradient ``g`` that this takes away."""
    pairs = [(p, p.grad) for p in parameters_of(optimizer) if p.grad is not None]
    parameters = [parameter for parameter, _ in pairs]
    norm = global_norm([gradient for _, gradient in pairs])
    optimizer.zero_grad(set_to_none=True)
    if not 0 < norm < math.inf:  # nowhere to go; or the step is not finite, and will be refused
        yield
        return
    copies = [p.detach().cpu() if copy_on_cpu else p.detach().clone() for p in parameters]
    try:
        moved = 0.0  # along the gradient, by weights that round
        with torch.no_grad():
            while pairs:  # each gradient is freed where it has been added
                parameter, gradient = pairs.pop()
                parameter.add_(gradient, alpha=rho / norm)
                if parameter.itemsize == 2:
                    copy = copies[len(pairs)].to(parameter.device)
                    step = (parameter - copy) * gradient
                    moved += number_of(step.sum(dtype=torch.float32)) / norm
        if all(p.itemsize == 2 for p in parameters) and moved < rho / 2:
            warnings.warn(
                f"{parameters[0].dtype} weights round away more than half of --sharpness-rho "
                f"{rho:g}: train fp32 weights (--dtype fp32) or an adapter (--lora-rank 16)",
                stacklevel=2,
            )
        yield
    finally:
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)
