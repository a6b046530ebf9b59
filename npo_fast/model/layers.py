"""What the layers of a decoder are, by their structure."""

import re
from typing import Any

from torch import nn

# what configurations call layers whose state runs on into the next sequence of a pack, and layers
# that choose or merge tokens of all that they are given
ACROSS = re.compile(
    "mamba|conv|linear|recurrent|ssm|delta|rwkv|lstm|hybrid|retention|compress|indexed|_sparse"
)


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the list of modules with most of the weights (experts are in one)."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=()))


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
