"""Quantization attack: weights are rounded to a few bits, as deployments do.

Unlearning at a small learning rate moves weights by less than half a quantization step, so that
rounding can undo it. Source: arXiv 2410.16454.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from npo_fast.distributed import full
from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.weights import restored

ROUTERS = {"router", "gate"}  # names of modules that choose experts


def fake_quantize(weight: Tensor, bits: int, group_size: int) -> Tensor:  # (out, in)
    """Returns ``s * round(w / s)`` with ``s = max |w| / (2^(bits - 1) - 1)`` over each group.

    Symmetric absmax rounding to nearest. A group is ``group_size`` neighbouring inputs of one
    output channel; the last group of a channel may be shorter. The error is at most ``s / 2``.
    Computed in fp32 (fp64 for fp64 weights) and returned in the dtype of ``weight``.

    torchao's ``quantize_affine`` multiplies by ``1 / s``, which breaks ties of half-precision
    weights another way, and refuses fp64 weights and a shorter last group.
    """
    opmath = weight.to(torch.promote_types(weight.dtype, torch.float32))
    groups = []
    for group in opmath.split(group_size, dim=1):
        scale = group.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        levels = torch.where(scale > 0, group / scale, 0)  # a group of zeros has no scale
        groups.append(levels.round() * scale)
    return torch.cat(groups, dim=1).to(weight.dtype)


@contextmanager
def quantized(lm: CausalLM, bits: int, group_size: int = 128) -> Iterator[float]:
    """Inside, ``lm`` is rounded by ``quantize_``, whose result this yields; then it is restored."""
    with restored(weights_to_round(lm)):
        yield quantize_(lm, bits, group_size)


@torch.no_grad()
def quantize_(lm: CausalLM, bits: int, group_size: int = 128) -> float:
    """Rounds ``weights_to_round`` in place.

    Returns their share of the decoder's weights, its embedding not counted.
    """
    count = 0
    for weight in weights_to_round(lm):
        whole = full(weight)  # of all processes that share it: groups of inputs are whole there
        rounded = fake_quantize(whole.flatten(0, -2), bits, group_size).view(whole.shape)
        if isinstance(weight, DTensor):
            mesh, placements = weight.device_mesh, weight.placements
            rounded = distribute_tensor(rounded, mesh, placements, src_data_rank=None)
        weight.copy_(rounded)
        count += weight.numel()
    outside = {id(lm.head.weight), id(lm.model.get_input_embeddings().weight)}
    return count / sum(p.numel() for p in lm.decoder.parameters() if id(p) not in outside)


def weights_to_round(lm: CausalLM) -> list[Tensor]:  # each (…, out, in)
    """Returns the weights of every linear layer and expert of the decoder.

    Embeddings, norms, routers, biases and the LM head keep their values, as is usual.

    Raises:
        UserError: the weights are quantised already, or the decoder has none to round.
    """
    if lm.quantized:
        raise UserError("these weights are 4 bits wide already: leave out --quantize")
    width = lm.head.weight.shape[1]
    weights = [
        weight
        for path, module in lm.decoder.named_modules()
        if module is not lm.head and not ROUTERS & {*path.split(".")}
        for weight in _matrices(module, width)
    ]
    if not weights:
        raise UserError(f"{lm.name} has no linear layer or expert that could be rounded")
    return weights


def _matrices(module: nn.Module, width: int) -> list[Tensor]:
    """The module's own weights that multiply hidden states of ``width``, as (…, out, in)."""
    if isinstance(module, nn.Linear):
        return [module.weight]
    if isinstance(module, Conv1D):  # GPT-2's layers hold (in, out)
        return [module.weight.t()]
    if isinstance(module, _ConvNd):
        return []
    return [
        p.transpose(1, 2) if _inputs_first(module, name, p, width) else p
        for name, p in module.named_parameters(recurse=False)
        if p.dim() == 3 and len(p) > 1  # one matrix an expert
    ]


def _inputs_first(module: nn.Module, name: str, weight: Tensor, width: int) -> bool:
    """Whether experts are stored as (expert, in, out), by transformers' mark or by the sizes."""
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    first, last = weight.shape[1:]
    if first == last:
        return False
    return last == width if "down" in name else first == width
