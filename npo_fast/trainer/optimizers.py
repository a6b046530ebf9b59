"""Optimizers by name: what they keep for each weight, and where they keep it."""

import importlib
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from npo_fast.distributed import full, local_of
from npo_fast.errors import UserError

Optimizer = Literal["adamw", "adamw-8bit", "adamw-bf16"]
LearningRateSchedule = Literal["linear", "cosine", "constant"]
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")  # in lower case


def check_optimizer(name: Optimizer) -> None:
    """Imports the library of an optimizer, or raises ``UserError``; reading states needs it too."""
    if name == "adamw":
        return
    if find_spec("torchao") is None:
        raise UserError(f"--optimizer {name} comes from torchao: pip install torchao")
    logging.disable(logging.WARNING)  # about GPU libraries that this does not need
    try:
        importlib.import_module("torchao.optim")
    finally:
        logging.disable(logging.NOTSET)


def trainable_parameters(parameters: Iterable[Parameter], name: Optimizer) -> list[Parameter]:
    """Those that require a gradient; ``UserError`` where the optimizer cannot train them."""
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise UserError("no weight of this model can be trained: add --lora-rank 16")
    if any(p.dtype == torch.float16 for p in trainable):
        raise UserError(
            "fp16 weights cannot be trained: squares of gradients vanish in fp16, and steps become "
            "far too long; use --dtype bf16 or fp32, or an adapter beside them (--lora-rank 16)"
        )
    if name == "adamw-bf16" and all(p.dtype != torch.bfloat16 for p in trainable):
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trainable}))
        raise UserError(
            f"--optimizer adamw-bf16 rounds bf16 weights, and those to train are {dtypes}: "
            "add --dtype bf16 (LoRA weights are always fp32), or use another --optimizer"
        )
    return trainable


def decays(model: nn.Module) -> Iterator[tuple[Parameter, bool]]:
    """The trainable parameters, and whether weight decay applies to each.

    The rule of ``transformers.Trainer``: not to ``nn.LayerNorm``, nor to what is named a bias or a
    norm.
    """
    in_layer_norm = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield parameter, name not in in_layer_norm and not NO_DECAY.search(name.lower())


def build_scheduler(
    optimizer: torch.optim.Optimizer, name: LearningRateSchedule, warmup: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of ``transformers.get_scheduler``; "constant" with a warm-up too."""
    from transformers import get_scheduler

    full_name = "constant_with_warmup" if name == "constant" else name
    return get_scheduler(full_name, optimizer, warmup, steps)


def build_optimizer(
    model: nn.Module, name: Optimizer, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW over the parameters that require a gradient; ``weight_decay`` on those of ``decays``.

    ================  =====================  ==========================================
    name              states of a weight     new weight, where weights are bf16
    ================  =====================  ==========================================
    adamw             2 of the weight's own  rounded to the nearest: small steps vanish
    adamw-8bit        2 x 1 byte + 1/32      rounded at random, right on average
    adamw-bf16        2 x 2 bytes            rounded at random, right on average
    ================  =====================  ==========================================

    The first is PyTorch's fused one. The others are torchao's, which rounds stochastically;
    bitsandbytes rounds to the nearest, which loses steps below 1/512 of a weight. With 8-bit
    states, tensors of less than 4096 values, or not of a multiple of 256, keep states of their
    own dtype.

    Raises:
        UserError: nothing to train, torchao is not installed, or adamw-bf16 without bf16 weights.
    """
    check_optimizer(name)
    trainable = trainable_parameters(model.parameters(), name)
    marked = list(decays(model))
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in (
            ([p for p, with_decay in marked if with_decay], weight_decay),
            ([p for p, with_decay in marked if not with_decay], 0.0),
        )
        if parameters
    ]
    if name == "adamw":
        if any(p.dtype == torch.bfloat16 for p in trainable):
            warnings.warn(
                "adamw rounds bf16 weights to the nearest, which loses steps of less than 1/512 of "
                "a weight: --optimizer adamw-bf16 or adamw-8bit rounds at random, --dtype fp32 "
                "keeps them",
                stacklevel=2,
            )
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    from torchao import optim

    kind = optim.AdamW8bit if name == "adamw-8bit" else optim._AdamW
    if trainable[0].device.type == "cpu":
        kind = type(kind.__name__, (_Eager, kind), {})
    return kind(groups, lr=lr, bf16_stochastic_round=True)


class _Eager:
    """torchao compiles its update once a shape: on a CPU, half a minute and a C++ compiler."""

    def step(self, closure: Any = None) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return super().step(closure)  # type: ignore[misc]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    """All that the optimizer trains, in the order of its state dict."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def number_of(total: Tensor) -> float:
    """The value of a sum over gradients, of all processes where they are sharded."""
    return float(full(total))


def norm_of(gradient: Tensor) -> Tensor:
    """The Euclidean norm of a gradient, or of this process's shard of it."""
    opmath = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(local_of(gradient), dtype=opmath)


def clipping(max_norm: float, norm: float) -> float:
    """The factor on gradients of this global norm, as ``clip_grad_norm_`` has it."""
    return min(1.0, max_norm / (norm + 1e-6))


def global_norm(gradients: list[Tensor]) -> float:
    """``torch.nn.utils.get_total_norm``, of shards on several processes and devices too."""
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return float(torch.nn.utils.get_total_norm(gradients))
    return norm_over_ranks([*map(norm_of, gradients)], gradients[0])


def clip_gradients(parameters: list[Parameter], max_norm: float) -> float:
    """``torch.nn.utils.clip_grad_norm_``, of shards on several processes and devices too."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = global_norm(gradients)
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm))
    elif (scale := clipping(max_norm, norm)) < 1:
        for gradient in gradients:
            local_of(gradient).mul_(scale)
    return norm


def norm_over_ranks(norms: list[Tensor], like: Tensor) -> float:
    """The norm of norms, over all processes where ``like`` is sharded."""
    device = local_of(like).device
    total = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
    if isinstance(like, DTensor):
        square = total.square().to(like.device_mesh.device_type)
        dist.all_reduce(square, group=like.device_mesh.get_group())
        total = square.sqrt()
    return float(total)


def step_one_at_a_time(optimizer: torch.optim.Optimizer) -> None:
    """The same as ``optimizer.step()``, with the states of one tensor in use at a time."""
    waiting = [(p, p.grad) for p in parameters_of(optimizer) if p.grad is not None]
    optimizer.zero_grad()
    for parameter, gradient in waiting:
        parameter.grad = gradient
        optimizer.step()
        parameter.grad = None


def keep_states_on_cpu(optimizer: torch.optim.Optimizer) -> None:
    """Keeps the states in CPU memory but for the step of their tensor.

    For an optimizer that steps a tensor at a time. torchao's ``CPUOffloadOptimizer`` is not used:
    it copies gradients away during the backward, before they can be clipped.
    """

    def to_device(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, name, state in _states_in_use(optimizer):
            optimizer.state[parameter][name] = state.to(parameter.device, non_blocking=True)

    def offload(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, name, state in _states_in_use(optimizer):
            on_cpu = state.to("cpu")
            if parameter.is_cuda and type(on_cpu) is Tensor:
                on_cpu = on_cpu.pin_memory()
            optimizer.state[parameter][name] = on_cpu

    held_back: list[dict[int, dict[str, Any]]] = []

    def hold_back(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        """Keeps ``load_state_dict`` from bringing all states to the GPU at once."""
        held_back.append(saved["state"])
        return {**saved, "state": {}}

    def restore(optimizer: torch.optim.Optimizer) -> None:
        parameters = parameters_of(optimizer)
        fused = optimizer.param_groups[0].get("fused")  # its step count is on the device
        for i, states in held_back.pop().items():
            device = parameters[i].device
            optimizer.state[parameters[i]] = {
                name: state.to(device) if fused and is_step_count(state) else state
                for name, state in states.items()
            }

    optimizer.register_load_state_dict_pre_hook(hold_back)
    optimizer.register_load_state_dict_post_hook(restore)
    optimizer.register_step_pre_hook(to_device)
    optimizer.register_step_post_hook(offload)


def _states_in_use(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Parameter, str, Tensor]]:
    """The states of parameters with a gradient, but for step counts."""
    for parameter in parameters_of(optimizer):
        if parameter.grad is not None:
            for name, state in list(optimizer.state.get(parameter, {}).items()):
                if isinstance(state, Tensor) and not is_step_count(state):
                    yield parameter, name, state


def is_step_count(state: Any) -> bool:
    """Whether a state is the number of steps of a parameter, not a tensor like it."""
    return isinstance(state, Tensor) and state.numel() <= 1
