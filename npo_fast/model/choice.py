"""Which attention a model gets: the fastest that is installed, runs on its GPU and fits it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import utils

from npo_fast.model.attention import NAME as PACKED
from npo_fast.model.varlen import DTYPES as HALF
from npo_fast.model.varlen import NAME as VARLEN
from npo_fast.model.varlen import head_dim_fits, is_usual_scale, parameters, varlen_function

# Versions of FlashAttention by compute capability, the fastest first: 3 was written for Hopper, 4
# for data-centre Blackwell; 4 runs on Hopper too, 2 on everything since Ampere
FLASH_VERSIONS = {9: (3, 4, 2), 10: (4, 2), 11: (4, 2)}
FLASH_CAPABILITY = (8, 0)
WIDEST_FLASH_4 = 128  # on Blackwell; its one pair of wider heads is not in every release

HEAD_DIM = ("qk_head_dim", "head_dim", "head_size", "attention_head_size")  # names in transformers
DROPOUT = ("attention_dropout", "attn_dropout", "dropout", "dropout_p", "dropout_prob", "attn_drop")


@dataclass(frozen=True)
class Machine:
    """What a device and the installed libraries offer to attention."""

    name: str  # of the device
    capability: tuple[int, int] | None = None  # of an NVIDIA GPU
    amd: bool = False
    flash: frozenset[int] = frozenset()  # versions of FlashAttention that are installed
    varlen: frozenset[str] | None = None  # parameters of PyTorch's varlen_attn, where it has one
    built: bool = True  # whether this PyTorch has the kernels of FlashAttention


@dataclass(frozen=True)
class Demands:
    """What the attention layers of a model ask of a kernel."""

    head_dims: frozenset[int] = frozenset({128})  # of queries and keys; empty: not known
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    window: bool = False
    scaled: bool = False  # by another factor than head_dim**-0.5


def machine_of(device: torch.device) -> Machine:
    """What this device and the installed libraries offer."""
    if device.type != "cuda":
        return Machine(str(device))
    amd = torch.version.hip is not None
    varlen = varlen_function()
    checks = {v: getattr(utils, f"is_flash_attn_{v}_available", None) for v in (2, 3, 4)}
    return Machine(
        str(device),
        None if amd else torch.cuda.get_device_capability(device),
        amd,
        frozenset(v for v, check in checks.items() if check is not None and check()),
        None if varlen is None else parameters(varlen),
        torch.backends.cuda.is_flash_attention_available(),
    )


def demands_of(decoder: torch.nn.Module, config: Any) -> Demands:
    """What a decoder asks of attention, by the attributes of its layers in transformers.

    Where layers lack them the configuration decides, and the probe.
    """
    layers: list[tuple[Any, int]] = [(m, h) for m in decoder.modules() if (h := _head_dim(m))]
    head_dims = frozenset(head_dim for _, head_dim in layers)
    if not head_dims and (head_dim := getattr(config, "head_dim", None)):
        head_dims = frozenset({head_dim})
    elif not head_dims and (heads := getattr(config, "num_attention_heads", None)):
        head_dims = frozenset({config.hidden_size // heads})
    return Demands(
        head_dims,
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        sinks=any(getattr(m, "sinks", None) is not None for m, _ in layers),
        dropout=any(_dropout(m) > 0 for m, _ in layers),
        window=bool(getattr(config, "sliding_window", None)),
        scaled=any(not is_usual_scale(m.scaling, head_dim) for m, head_dim in layers),
    )


def _head_dim(module: Any) -> int | None:
    """The head dimension of an attention layer; None for any other module."""
    if not isinstance(getattr(module, "scaling", None), int | float):
        return None
    values = (getattr(module, name, None) for name in HEAD_DIM)
    return next((value for value in values if isinstance(value, int)), None)


def _dropout(module: Any) -> float:
    values = (getattr(module, name, None) for name in DROPOUT)
    rates = (value.p if isinstance(value, torch.nn.Dropout) else value for value in values)
    return max((rate for rate in rates if isinstance(rate, float)), default=0.0)


def attentions(
    machine: Machine,
    dtype: torch.dtype,
    demands: Demands,
    flash: bool = True,  # whether the model takes the FlashAttention packages
) -> Iterator[str]:
    """The attentions that serve a model, the fastest first."""
    if flash and (version := flash_version(machine, dtype, demands)) is not None:
        yield f"flash_attention_{version}"
    if varlen_obstacle(machine, dtype, demands) is None:
        yield VARLEN
    yield PACKED


def flash_version(machine: Machine, dtype: torch.dtype, demands: Demands) -> int | None:
    """The installed version of FlashAttention that serves best; None where none does."""
    if dtype not in HALF or demands.sinks:  # 2 has no sinks, the others differ in them
        return None
    versions: tuple[int, ...] = (2,) if machine.amd else ()
    if machine.capability is not None and machine.capability >= FLASH_CAPABILITY:
        versions = FLASH_VERSIONS.get(machine.capability[0], (2,))
    serving = (v for v in versions if v in machine.flash and _flash_serves(v, machine, demands))
    return next(serving, None)


def _flash_serves(version: int, machine: Machine, demands: Demands) -> bool:
    if demands.dropout and version > 2:  # later versions leave it out
        return False
    if version == 4:
        blackwell = machine.capability is not None and machine.capability[0] > 9
        too_wide = blackwell and max(demands.head_dims, default=0) > WIDEST_FLASH_4
        if too_wide or demands.softcap:  # not every release has a softcap in the backward
            return False
    return all(head_dim_fits(head_dim) for head_dim in demands.head_dims)


def varlen_obstacle(machine: Machine, dtype: torch.dtype, demands: Demands) -> str | None:
    """Why PyTorch's varlen_attn cannot serve, and what to do instead; None where it can."""
    version = f"PyTorch {torch.__version__}"
    if machine.capability is None or machine.capability < FLASH_CAPABILITY:
        kind = " (AMD)" if machine.amd else ""
        kind = " ({}.{})".format(*machine.capability) if machine.capability else kind
        return (
            "it runs on NVIDIA GPUs of compute capability 8.0 or newer, and the model is on "
            f"{machine.name}{kind}: name --attention auto or {PACKED}"
        )
    if machine.varlen is None:
        return f"{version} has no varlen_attn: upgrade to 2.10 or newer, or name --attention auto"
    if not machine.built:
        return f"{version} was built without FlashAttention: name --attention auto"
    if dtype not in HALF:
        return (
            f"it takes bf16 and fp16, and the model is {str(dtype).removeprefix('torch.')}: "
            "name --dtype bf16, or --attention auto"
        )
    unfit = next((d for d in sorted(demands.head_dims) if not head_dim_fits(d)), None)
    newer = "PyTorch has to be 2.11 or newer"
    missing = {
        f"heads of {unfit} are not a multiple of 8 up to 256": unfit is not None,
        "it has no softcap, and the model has attn_logit_softcapping": demands.softcap,
        "it has no attention sinks, and the model has some": demands.sinks,
        "it has no dropout, and the model has attention dropout": demands.dropout,
        f"the model has a scale of its own, for which {newer}": (
            demands.scaled and "scale" not in machine.varlen
        ),
        f"the model has a window, for which {newer}": (
            demands.window and "window_size" not in machine.varlen
        ),
    }
    return next((f"{why}: name --attention auto" for why, lacks in missing.items() if lacks), None)
