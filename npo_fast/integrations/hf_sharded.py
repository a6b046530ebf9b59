"""Models that FSDP2 or DeepSpeed divides among processes: the loss is computed inside the head.

Both gather a module's weight just before its forward, and again before its backward. They free it
afterwards and add the gradient to each process's share. So the head's forward is exchanged for the
computation of the loss while a pack runs through the model. Its weight is whole there, and the
wrapper sees the loss as what the head returns. The logits of all tokens never exist.

accelerate divides models on GPUs alone. The tests make it take CPU processes for such: two and four
train as one, to 1e-5, under FSDP2 and ZeRO-3. ``cpu_offload``, which pins memory, needs a GPU and
is untested.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from npo_fast.data import PackedBatch
from npo_fast.errors import UserError
from npo_fast.model.causal_lm import CausalLM


class GatheredCausalLM(CausalLM):
    """A ``CausalLM`` whose model a wrapper divides: the head's weight is whole where it is needed.

    Until the wrapper has divided the model, every process has all of it.

    Raises:
        UserError: a model that takes one sequence at a time, and so other numbers of passes.
    """

    head_is_whole = False  # a copy, where code outside of its forward reads it

    def __init__(self, model: Any, attention: str = "auto") -> None:
        super().__init__(model, attention)
        if not self.packs:
            raise UserError(
                f"{self.name} takes one sequence at a time with {self.attention}, and processes "
                "that share a model need packs: use DDP, or another attention"
            )

    @property
    def vocabulary(self) -> int:
        """Token ids that the model can read and predict."""
        weights = self.model.get_input_embeddings().weight, self.head.weight
        # of a weight of ZeRO-3, the shape is that of what this process sees
        return min(getattr(weight, "ds_shape", weight.shape)[0] for weight in weights)

    @contextmanager
    def within(self, wrapper: Any) -> Iterator[None]:
        """Inside, all goes through ``wrapper``'s forward, which may be the model's own (FSDP2)."""
        self.wrapper = wrapper
        try:
            yield
        finally:
            self.wrapper = None

    def log_probs(self, batch: PackedBatch) -> Tensor:  # (N,)
        """Log-probability of every answer token."""
        return self.inside_head(
            batch, lambda states: self.log_probs_of(self.answer_rows(states, batch), batch.labels)
        )

    def inside_head(
        self,
        batch: PackedBatch,
        compute: Callable[[Tensor], Tensor],  # (T, D) -> (n,) or a number
    ) -> Tensor:
        """Returns ``compute(states)``, called where the head's weight is whole."""
        if self.wrapper is None or self.head_is_whole:
            return compute(self.states(batch))
        results: list[Tensor] = []
        outputs: list[Tensor] = []  # the results, with what the wrapper does before its backward
        caught: list[Any] = []

        def forward(*_: Any) -> Tensor:
            results.append(compute(caught[0].last_hidden_state[0].to(self.dtype)))
            return results[0].reshape(1, 1, -1).clone()  # in the shape of logits

        hooks = (
            self.decoder.register_forward_hook(lambda _module, _inputs, out: caught.append(out)),
            self.head.register_forward_hook(lambda _module, _inputs, out: outputs.append(out)),
        )
        with hooks[0], hooks[1], _exchanged_forward(self.head, forward):
            self.states(batch)
        (result,), (output,) = results, outputs
        output = output.reshape(result.shape).to(result.dtype)
        # mixed precision rounds what a module returns: the value is the exact one
        return output + (result - output).detach()

    @contextmanager
    def with_whole_head(self) -> Iterator[None]:
        """Inside, the head is a whole copy on every process, for code that reads its weight."""
        head = self.head
        weight, bias = head.weight, getattr(head, "bias", None)
        with gathered([p for p in (weight, bias) if p is not None]):
            self.head = nn.Linear(1, 1, bias=False, device="meta")
            self.head.weight = _copy(weight)
            self.head.bias = None if bias is None else _copy(bias)
        self.head_is_whole = True
        try:
            yield
        finally:
            self.head, self.head_is_whole = head, False
            for module in self.model.modules():  # after a forward, some keep whole weights
                if isinstance(module, FSDPModule):
                    module.reshard()


def check_wrapper(trainer: Any) -> None:
    """Raises ``UserError`` where a ``Trainer`` would wrap its model in what we cannot use."""
    if trainer.args.n_gpu > 1:
        raise UserError(
            "the model would be wrapped as DataParallel: start one process a GPU (`torchrun` or "
            "`accelerate launch`)"
        )
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise UserError(
            "the model was divided when it was loaded: load it whole, and use "
            "TrainingArguments(fsdp=True)"
        )
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise UserError(
            "accelerate has no FSDP on this device and would train with DDP: leave fsdp out"
        )
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    if getattr(trainer.model, "is_quantized", False):
        raise UserError("4-bit weights (bitsandbytes) cannot be divided among processes: use DDP")
    if not trainer.args.accelerator_config.even_batches:
        raise UserError(
            "processes that share a model need as many batches each: leave even_batches=True"
        )
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if getattr(plugin, "fsdp_version", 1) == 1:
        raise UserError(
            "FSDP1 keeps the weights of several modules in one flat tensor: use FSDP2, with "
            "fsdp_config={'version': 2} or `accelerate launch --fsdp_version 2`, and accelerate "
            "1.6 or newer"
        )
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            "with cpu_ram_efficient_loading only the first process has weights, and each computes "
            "log-probs of the reference: leave it out, or `accelerate launch "
            "--fsdp_cpu_ram_efficient_loading false`"
        )


def dtype_of_deepspeed(trainer: Any) -> torch.dtype | None:
    """The dtype that DeepSpeed casts the weights of a ``Trainer``'s model to; None leaves them."""
    if not trainer.is_deepspeed_enabled:
        return None
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(name, {}).get("enabled") is True:
            return dtype
    return None


def is_divided(parameter: Any) -> bool:
    """Whether DeepSpeed has divided a parameter among processes (ZeRO-3)."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: list[Any]) -> AbstractContextManager[Any]:
    """Inside, parameters that DeepSpeed has divided (ZeRO-3) are whole; others stay as they are."""
    divided = [p for p in parameters if is_divided(p)]
    if not divided:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(divided)  # type: ignore[no-any-return]


@torch.no_grad()
def _copy(parameter: Any) -> nn.Parameter:
    """All of a parameter, on the device that computes with it."""
    if isinstance(parameter, DTensor):  # with cpu_offload, the shards lie on the CPU
        shards: Any = parameter.to(parameter.device_mesh.device_type)
        parameter = shards.full_tensor()
    return nn.Parameter(parameter.detach().clone(), requires_grad=False)


@contextmanager
def _exchanged_forward(module: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, ``module`` has this forward; hooks around it stay."""
    earlier = vars(module).get("forward")  # of a module whose forward accelerate has wrapped
    module.forward = forward
    try:
        yield
    finally:
        if earlier is None:
            del module.forward
        else:
            module.forward = earlier
