"""Weights rounded to a few bits and back, as a deployment would: does the knowledge come back?

Unlearning at a small learning rate moves weights by less than half a step of a coarse grid, so that
rounding can undo it. Source: arXiv 2410.16454.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM

ROUTERS = {"router", "gate"}  # names of modules that choose experts


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
    opmath = weight.to(torch.promote_types(weight.dtype, torch.float32))
    parts = []
    for part in opmath.split(group, dim=1):
        scale = part.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        steps = torch.where(scale > 0, part / scale, 0)  # a group of zeros has no scale
        parts.append(steps.round() * scale)
    return torch.cat(parts, dim=1).to(weight.dtype)


@torch.no_grad()
def quantize_(lm: CausalLM, bits: int, group: int = 128) -> float:
    """Rounds every linear layer and expert of the decoder in place; returns their share of it.

    Embeddings, norms, routers, biases and the LM head stay, as is the custom; the share is that of
    the decoder's weights without its embedding.

    Raises:
        UserError: the weights are quantised already.
    """
    if lm.quantized:
        raise UserError("these weights are 4 bits wide already: leave out --quantize")
    count = 0
    width = lm.head.weight.shape[1]
    for path, module in lm.decoder.named_modules():
        if module is lm.head or ROUTERS & {*path.split(".")}:
            continue
        for weight in _matrices(module, width):  # (..., out, in)
            flat = weight.flatten(0, -2)
            weight.copy_(rounded(flat, bits, group).view(weight.shape))
            count += weight.numel()
    if count == 0:
        raise UserError(f"{lm.name} has no linear layer or expert that could be rounded")
    outside = {id(lm.head.weight), id(lm.model.get_input_embeddings().weight)}
    return count / sum(p.numel() for p in lm.decoder.parameters() if id(p) not in outside)


def _matrices(module: nn.Module, width: int) -> list[Tensor]:
    """Weights of this module itself that multiply hidden states of ``width``, inputs last."""
    if isinstance(module, nn.Linear):
        return [module.weight]
    if isinstance(module, Conv1D):  # GPT-2's layers hold (in, out)
        return [module.weight.t()]
    if isinstance(module, _ConvNd):
        return []
    own = module.named_parameters(recurse=False)
    experts = {name: p for name, p in own if p.dim() == 3 and len(p) > 1}
    return [
        p.transpose(1, 2) if _inputs_first(module, name, p, width) else p
        for name, p in experts.items()
    ]


def _inputs_first(module: nn.Module, name: str, weight: Tensor, width: int) -> bool:
    """Whether experts hold (expert, in, out): transformers says so, or the sizes do."""
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    first, last = weight.shape[1:]
    if first == last:
        return False
    return last == width if "down" in name else first == width
