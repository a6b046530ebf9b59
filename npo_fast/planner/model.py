"""Models without data: the shapes and the code of a real one, from its configuration alone."""

import warnings
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast.errors import UserError
from npo_fast.model.adapters import Quantize, add_lora, check_libraries
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.load import DTYPES
from npo_fast.planner.tracker import FlashAttention


def empty_model(config: Any, dtype: str, lora_rank: int = 0, quantize: Quantize = "none") -> Any:
    """The Hugging Face model of a configuration on the meta device, as it would be trained.

    With ``quantize`` its linear layers, but for the head, are 4-bit; with ``lora_rank`` adapters
    stand beside them (peft, in fp32 as peft has them beside half-precision weights) and nothing
    else is trained.

    Raises:
        UserError: not a causal language model, or peft is not installed.
    """
    from transformers import AutoModelForCausalLM

    check_libraries("none", lora_rank)  # 4-bit weights are stood in for, without their library

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=DTYPES[dtype])
    except (ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"not a causal language model: {reason}") from error
    if quantize == "4bit":
        _quantise(model, model.get_output_embeddings())
    if lora_rank:
        model = add_lora(model, config.name_or_path, lora_rank, alpha=lora_rank)
    model.config.use_cache = False
    return model.train()


def empty_lm(model: Any, gradient_checkpointing: bool) -> CausalLM:
    """
    Raises:
        UserError: no linear head, or no gradient checkpointing.
    """
    lm = CausalLM(model, probe=False)
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"{type(model).__name__} has no gradient checkpointing: leave it out")
        # a backward runs outside of such modes, and recomputes layers there
        arguments = {
            "use_reentrant": False,
            "context_fn": lambda: (FlashAttention(), FlashAttention()),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers gives it a new name
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    return lm


class NF4Linear(torch.nn.Linear):
    """``x W^T`` with W in 4-bit blocks of 64, as bitsandbytes keeps it: 4.127 bits a weight.

    Each block has one byte of scale, each 256 of those one in fp32 (double quantisation, QLoRA,
    arXiv 2305.14314). Forward and backward each make W anew and let it go.
    """

    def __init__(self, whole: torch.nn.Linear) -> None:
        super().__init__(
            whole.in_features, whole.out_features, whole.bias is not None,
            device="meta", dtype=whole.weight.dtype,
        )  # fmt: skip
        self.wide = whole.weight.shape
        blocks = -(-whole.weight.numel() // 64)
        packed = torch.empty(-(-whole.weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8, device="meta"))
        self.register_buffer("second", torch.empty(-(-blocks // 256), device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return _NF4Matmul.apply(x, self.wide, self.bias)


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
