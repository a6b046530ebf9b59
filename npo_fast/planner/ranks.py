"""One of several GPUs that share a model, on tensors without data.

Embedding, head and loss are the package's own (``npo_fast.ops.vocab_parallel``), with collectives
that do nothing. FSDP2 does not run without data, so ``ShardedLayers`` allocates and frees what it
would for each decoder layer (PyTorch 2.13, ``_fsdp_param_group.py``):

    forward    the gathered buffer, and the layer's weights copied out of it; the buffer lives until
               the next layer's gather
    backward   the layer's weights, the gathered buffer of the layer before, the layer's whole
               gradient, and the buffer of the layer behind it whose gradients are summed over
               ranks: in fp32 where weights are in half precision
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from npo_fast.errors import UserError
from npo_fast.model import sharding
from npo_fast.model.causal_lm import CausalLM
from npo_fast.model.layers import repeated_layers
from npo_fast.planner.tracker import Tracker


class SilentGroup(dist.ProcessGroup):
    """Rank 0 of so many, whose collectives leave their outputs as they are."""

    def __init__(self, ranks: int) -> None:
        super().__init__(0, ranks)  # type: ignore[call-arg]

    def _nothing(self, *_: Any) -> Any:
        """Has nobody to talk to."""

    all_gather_single = reduce_scatter_single = allreduce = _nothing  # type: ignore[assignment]
    # their names before PyTorch 2.13
    _allgather_base = _reduce_scatter_base = _nothing  # type: ignore[assignment]


class LocalRows(nn.Parameter):
    """Stands for a ``DTensor`` in rows."""

    def to_local(self) -> Tensor:
        """This rank's rows."""
        return self


def local_shape(parameter: Tensor, ranks: int) -> tuple[int, ...]:
    """The shape of the largest share of a tensor that is divided by rows."""
    return -(-parameter.shape[0] // ranks), *parameter.shape[1:]


def slice_vocabulary(lm: CausalLM, ranks: int) -> None:
    """Leaves one rank's rows of embedding and head in place."""

    def rows(parameter: nn.Parameter) -> LocalRows:
        own = parameter.new_empty(local_shape(parameter, ranks))
        return LocalRows(own, requires_grad=parameter.requires_grad)

    lm.head = sharding.slice_vocabulary(lm.model, SilentGroup(ranks), rows)
    lm.vocabulary_slice = lm.head.vocabulary


class Layer:
    """What FSDP2 gathers and reduces together: a decoder layer, or what lies outside of them."""

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter], ranks: int) -> None:
        self.module, self.parameters = module, parameters
        shares = [
            torch.empty(local_shape(p, ranks), dtype=p.dtype, device="meta") for p in parameters
        ]
        self.gathered_bytes = ranks * sum(share.nbytes for share in shares)
        self.local_bytes = sum(share.nbytes for share in shares)
        self.shares = dict(zip(parameters, shares, strict=True))
        half = any(p.itemsize == 2 for p in parameters)
        self.reduce_itemsize = 4 if half else max(p.itemsize for p in parameters)  # 4-bit: 1
        self.buffer: Tensor | None = None  # gathered in advance
        self.weights: Tensor | None = None  # whole
        self.ran = False  # forward since the last backward


class ShardedLayers:
    """Allocates what FSDP2 would around each layer of ``lm``'s decoder.

    Args:
        reduced: called with a parameter and its share of a gradient, after its layer's sum.
    """

    def __init__(
        self,
        lm: CausalLM,
        tracker: Tracker,
        ranks: int,
        kinds: tuple[str, str, str],  # of weights, gradients, and buffers that sum these
        reduced: Callable[[nn.Parameter], None],
        offload: bool = False,
    ) -> None:
        self.tracker, self.ranks, self.reduced, self.offload = tracker, ranks, reduced, offload
        self.weights_kind, self.gradients_kind, self.sums_kind = kinds
        words = {lm.model.get_input_embeddings().weight, *lm.head.parameters()}
        modules = [*repeated_layers(lm.decoder), lm.decoder]
        if len(modules) == 1:
            raise UserError(f"{lm.name} has no list of layers to gather one at a time")
        self.layers: list[Layer] = []
        seen = set(words)
        for module in modules:
            parameters = [p for p in dict.fromkeys(module.parameters()) if p not in seen]
            seen.update(parameters)
            if parameters:
                self.layers.append(Layer(module, parameters, ranks))
        self.of = {p: layer for layer in self.layers for p in layer.parameters}
        self._last_buffer: Tensor | None = None  # of the forward, until the next gather
        self._sums: Tensor | None = None  # the last layer's gradients, until the next sum
        self._in_backward = False
        for layer in self.layers:
            for parameter, share in layer.shares.items():
                tracker.hold(parameter, self.weights_kind, 0 if offload else share.nbytes)
            layer.module.register_forward_pre_hook(self._before(layer), with_kwargs=True)
            layer.module.register_forward_hook(self._after(layer))

    def end_of_backward(self) -> None:
        """Reduces what no input's gradient has announced, as FSDP2's last callback does."""
        for layer in self.layers:
            self._backward_done(layer)
            layer.buffer, layer.ran = None, False
        self._sums, self._in_backward = None, False

    def _allocate(self, size: int, kind: str) -> Tensor:
        return self.tracker.hold(torch.empty(size, dtype=torch.uint8, device="meta"), kind)

    def _gather(self, layer: Layer) -> Tensor:
        """The gathered buffer; weights that are kept on the CPU visit the GPU first."""
        on_gpu = self._allocate(layer.local_bytes if self.offload else 0, self.weights_kind)
        buffer = self._allocate(layer.gathered_bytes, self.weights_kind)
        del on_gpu
        return buffer

    def _before(self, layer: Layer) -> Callable[..., Any]:
        def before(_: nn.Module, inputs: Any, arguments: Any) -> Any:
            if self._in_backward:  # its activations are computed again
                return None
            buffer = self._gather(layer)
            self._last_buffer = None
            layer.weights = self._allocate(layer.gathered_bytes, self.weights_kind)
            self._last_buffer = buffer

            def announce(tensor: Tensor) -> Tensor:
                if not tensor.requires_grad:
                    return tensor
                return _Announce.apply(tensor, lambda: self._backward_done(layer))

            return tree_map_only(Tensor, announce, (inputs, arguments))

        return before

    def _after(self, layer: Layer) -> Callable[..., None]:
        def after(_: nn.Module, inputs: Any, outputs: Any) -> None:
            if self._in_backward:
                return
            layer.weights, layer.ran = None, True
            if layer is self.layers[-1]:  # the decoder itself
                self._last_buffer = None
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor) and output.requires_grad:
                    output.register_hook(lambda _: self._backward_begins(layer))

        return after

    def _backward_begins(self, layer: Layer) -> None:
        self._in_backward = True
        if layer.weights is not None:
            return
        if layer.buffer is None:
            layer.buffer = self._gather(layer)
        layer.weights = self._allocate(layer.gathered_bytes, self.weights_kind)
        layer.buffer = None
        position = self.layers.index(layer)
        if layer.ran and position and (earlier := self.layers[position - 1]).ran:
            earlier.buffer = self._gather(earlier)
        layer.ran = False  # a second backward prefetches nothing

    def _backward_done(self, layer: Layer) -> None:
        layer.weights = None
        parameters = [p for p in layer.parameters if p.grad is not None]
        if not parameters:
            return
        self._sums = None
        values = sum(layer.shares[p].numel() for p in parameters)
        size = layer.reduce_itemsize * values
        self._sums = self._allocate(self.ranks * size, self.sums_kind)
        for parameter in parameters:
            parameter.grad = None
        local = self._allocate(size, self.gradients_kind)
        if layer.reduce_itemsize != parameters[0].itemsize:
            local = self._allocate(values * parameters[0].itemsize, self.gradients_kind)
        for parameter in parameters:
            self.reduced(parameter)
        del local


class _Announce(torch.autograd.Function):
    """The identity; calls ``done`` when the gradient of its input is there."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, done: Callable[[], None]) -> Tensor:
        ctx.done = done
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.done()
        return upstream, None
