"""Norms of the gradient of one answer's loss in the weights."""

from functools import partial

import torch

from npo_fast.data import TokenizedExample, pack
from npo_fast.model.causal_lm import CausalLM


def gradient_norms(lm: CausalLM, example: TokenizedExample, counted: int) -> list[float]:
    """Returns the Euclidean norm of the gradient in each weight tensor of the model.

    The loss is the mean negative log-prob of the first ``counted`` answer tokens. Each gradient is
    dropped when it has been measured. Tied weights are one tensor. Of a 4-bit model the tensors
    that are not quantised take part.
    """
    parameters = [p for p in lm.model.parameters() if p.is_floating_point()]
    trained = [p.requires_grad for p in parameters]
    norms: list[torch.Tensor] = []
    hooks = []
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
            measure = partial(_measure_and_drop, norms)
            hooks.append(parameter.register_post_accumulate_grad_hook(measure))
        (batch,) = pack([example], len(example.input_ids))
        with torch.enable_grad():
            log_probs = lm.log_probs(batch.to(lm.device))
            (-log_probs[:counted].mean()).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, trains in zip(parameters, trained, strict=True):
            parameter.requires_grad_(trains)
    return torch.stack(norms).tolist()


def _measure_and_drop(norms: list[torch.Tensor], parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
    parameter.grad = None
