"""What the layers of a decoder are, by their structure."""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from npo_fast.errors import UserError

# what configurations call layers whose state runs on into the next sequence of a pack, and layers
# that choose or merge tokens of all that they are given
ACROSS = re.compile(
    "mamba|conv|linear|recurrent|ssm|delta|rwkv|lstm|hybrid|retention|compress|indexed|_sparse"
)


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the list of modules with most of the weights (experts are in one)."""
    return list(_layer_list(model))


def _layer_list(model: nn.Module) -> nn.ModuleList:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    weights = (sum(p.numel() for p in m.parameters()) for m in lists)
    return max(zip(weights, lists, strict=True), key=lambda x: x[0], default=(0, nn.ModuleList()))[
        1
    ]


def layer_number(model: nn.Module, number: int | None) -> int:
    """A decoder layer by its number from 0; None is the last of the first quarter: 7 of 32.

    Raises:
        UserError: the model has no such layer.
    """
    depth = len(_layer_list(model))
    if number is None:
        number = max(0, depth // 4 - 1)
    if number >= depth:
        last = f"its last is {depth - 1}" if depth else "npo_fast finds no list of layers in it"
        raise UserError(
            f"{type(model).__name__} has no decoder layer {number} ({last}): name another --layer"
        )
    return number


class _StopError(Exception):
    """Leaves a decoder whose later layers are not needed."""


class _Stop(nn.Module):
    """Stands in a decoder for a layer that does not run."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *_: Any, **__: Any) -> None:
        raise _StopError


def layer_output(decoder: nn.Module, number: int, run: Callable[[], Any]) -> Tensor:  # (1, T, D)
    """What decoder layer ``number`` hands on while ``run`` calls the decoder; no later layer runs.

    Raises:
        UserError: layers that do not hand on one state a token, each of them once.
    """
    layers = _layer_list(decoder)
    outputs: list[Any] = []
    hook = layers[number].register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
    following = layers[number + 1] if number + 1 < len(layers) else None
    try:
        if following is not None:
            layers[number + 1] = _Stop(following)
        run()
    except _StopError:
        if isinstance(decoder, FSDPModule):  # it would have done so at the end of its forward
            decoder.reshard()
    finally:
        hook.remove()
        if following is not None:
            layers[number + 1] = following
    states = [out[0] if isinstance(out, tuple) else out for out in outputs]
    if len(states) != 1 or not isinstance(states[0], Tensor) or states[0].dim() != 3:
        raise UserError(
            f"layer {number} of {type(decoder).__name__} does not hand on one hidden state a "
            "token: use another --method"
        )
    return states[0]


def mixing_layers(model: Any, decoder: nn.Module) -> str:
    """Which layers no mask keeps within a sequence; empty where plain attention mixes tokens.

    Recurrent, convolutional and linear-attention layers hand a state on; sparse attention with an
    index takes the best tokens of a whole pack, once that has more than it may take.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if named := sorted({kind for kind in kinds or () if ACROSS.search(kind)}):
        return f"layers of {', '.join(named)}"
    direct = [m for m in decoder.children() if isinstance(m, nn.ModuleList)]
    if getattr(config, "index_topk", None):
        return f"attention to {config.index_topk} indexed tokens"
    for layers in direct or [nn.ModuleList(repeated_layers(decoder))]:
        for module in layers.modules():
            is_wide = isinstance(module, nn.Conv1d) and max(module.kernel_size) > 1
            if is_wide or isinstance(module, nn.RNNBase | nn.RNNCellBase):
                return f"layers with {type(module).__name__}"
    if not kinds and any(getattr(m, "_is_stateful", False) for m in model.modules()):
        return "recurrent layers"
    return ""
