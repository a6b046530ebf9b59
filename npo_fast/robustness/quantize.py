"""Weights rounded to a few bits and back, as a deployment would: does the knowledge come back?

Unlearning at a small learning rate moves weights by less than half a step of a coarse grid, so that
rounding can undo it. Source: arXiv 2410.16454.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:  # (out, in) -> (out, in)
    """``s * round(w / s)`` with ``s = max |w| / (2^(bits - 1) - 1)`` over a group.

    Symmetric absmax rounding to nearest; a group is ``group`` neighbouring inputs of one output
    channel, the last one of a row may be shorter. The error is at most ``s / 2``. Computed in fp32
    (fp64 for fp64 weights) and returned in the dtype of ``weight``.

    Raises:
        ValueError: ``bits`` outside 2 to 8, or ``group`` below 1.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    parts = []
    for part in wide.split(group, dim=1):
        scale = part.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        steps = torch.where(scale > 0, part / scale, 0)  # a group of zeros has no scale
        parts.append(steps.round() * scale)
    return torch.cat(parts, dim=1).to(weight.dtype)


@torch.no_grad()
def quantize_(lm: CausalLM, bits: int, group: int = 128) -> int:
    """Rounds every linear layer of the decoder in place; returns how many weights that were.

    Embeddings, norms, biases and the LM head stay, as is the custom.

    Raises:
        UserError: the weights are quantised already.
    """
    if lm.quantized:
        raise UserError("these weights are 4 bits wide already: leave out --quantize")
    count = 0
    for module in lm.decoder.modules():
        if module is lm.head or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        transposed = isinstance(module, Conv1D)  # GPT-2's layers hold (in, out)
        weight = module.weight.t() if transposed else module.weight
        weight.copy_(rounded(weight, bits, group))
        count += weight.numel()
    return count
