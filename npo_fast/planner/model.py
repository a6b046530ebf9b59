"""Models without data: shapes and code of a real model, from its configuration alone."""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast.errors import UserError, first_line
from npo_fast.model.adapters import Quantize, add_lora, check_libraries
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.load import DTYPES
from npo_fast.planner.tracker import FlashAttention


def empty_model(config: Any, dtype: str, lora_rank: int = 0, quantize: Quantize = "none") -> Any:
    """The Hugging Face model of a configuration on the meta device, as it would be trained.

    With ``quantize`` its linear layers except the head are 4-bit. With ``lora_rank`` only LoRA
    adapters are trained (peft's, in fp32 as peft keeps them beside half-precision weights).

    Raises:
        UserError: not a causal language model, or peft is not installed.
    """
    from transformers import AutoModelForCausalLM

    check_libraries("none", lora_rank)  # NF4Linear replaces 4-bit layers
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=DTYPES[dtype])
    except (ValueError, AttributeError) as error:
        raise UserError(f"not a causal language model: {first_line(error)}") from error
    if quantize == "4bit":
        _quantise(model, model.get_output_embeddings())
    if lora_rank:
        model = add_lora(model, config.name_or_path, lora_rank)
    model.config.use_cache = False
    return model.train()


def empty_lm(model: Any, gradient_checkpointing: bool) -> CausalLM:
    """The model as the training loop sees it.

    Raises:
        UserError: no linear head, or no gradient checkpointing.
    """
    lm = CausalLM(model, probe=False)
    if gradient_checkpointing:
        # the backward pass recomputes layers, outside of the mode of the forward pass
        lm.recompute_activations(context_fn=lambda: (FlashAttention(), FlashAttention()))
    return lm


class NF4Linear(torch.nn.Linear):
    """``x W^T`` with W in 4-bit blocks of 64 values, as in bitsandbytes: 4.127 bits a weight.

    Each block has a scale of one byte; 256 scales share one in fp32 (double quantisation, QLoRA,
    arXiv 2305.14314). Forward and backward dequantise W each time and free it.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None,
            device="meta", dtype=linear.weight.dtype,
        )  # fmt: skip
        self.dequantised_shape = linear.weight.shape
        blocks = -(-linear.weight.numel() // 64)
        packed = torch.empty(-(-linear.weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8, device="meta"))
        self.register_buffer("second", torch.empty(-(-blocks // 256), device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` with W dequantised."""
        return _NF4Matmul.apply(x, self.dequantised_shape, self.bias)


class _NF4Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size, bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = upstream
        return gradient @ gradient.new_empty(ctx.shape), None, None


def _quantise(model: Any, head: Any) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear and child is not head:
                setattr(parent, name, NF4Linear(child))
    model.requires_grad_(False)
