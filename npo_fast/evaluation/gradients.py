"""Norms of the gradient of one answer's loss in the weights."""

from functools import partial

import torch

from npo_fast.data import TokenizedExample
from npo_fast.distributed import local_of
from npo_fast.losses import NLL
from npo_fast.model.causal_lm import CausalLM
from npo_fast.ops import linear_sequence_loss


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
        (batch,) = lm.micro_batches([example], len(example.input_ids))
        with torch.enable_grad():
            loss, _ = linear_sequence_loss(
                lm.hidden(batch)[:counted], labels=batch.labels[:counted], loss=NLL(),
                cu_seqlens=torch.tensor([0, counted]), reduction="token_mean", **lm.head_arguments,
            )  # fmt: skip
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, trains in zip(parameters, trained, strict=True):
            parameter.requires_grad_(trains)
    squares = lm.all_reduce_sum(torch.stack(norms).square())
    return squares.sqrt().tolist()


def _measure_and_drop(norms: list[torch.Tensor], parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    norms.append(torch.linalg.vector_norm(local_of(parameter.grad), dtype=torch.float32))
    parameter.grad = None
