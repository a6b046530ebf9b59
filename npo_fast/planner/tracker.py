"""Counts bytes of tensors alive, by kind.

PyTorch has such a tracker (``torch.distributed._tools.mem_tracker``), and the tests compare this
one with it. PyTorch's is private, does not know losses that compute gradients in their forward
pass, and takes snapshots around every module, which is slow for models of 80 layers.
"""

import weakref
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from npo_fast.ops.cost import SLICE_BYTES


class Tracker(TorchDispatchMode):
    """Bytes alive by kind, now and when their sum was largest."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = "activations"
        """What a new storage counts as."""
        self.alive: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._storages: dict[int, tuple[Any, list[Any]]] = {}  # address -> weak reference, entry

    @property
    def peak(self) -> int:
        """The largest sum of bytes so far."""
        return sum(self.at_peak.values())

    def hold(self, tensor: Tensor, kind: str, size: int | None = None) -> Tensor:
        """Counts the tensor's storage as ``kind``, whatever it was before; returns the tensor.

        ``size`` is the number of bytes to count, where a GPU does not have all of the tensor's.
        """
        storage = tensor.untyped_storage()
        entry = self._entry(storage)
        self.alive[entry[0]] -= entry[1]
        entry[0] = kind
        entry[1] = entry[1] if size is None else size
        self.alive[kind] += entry[1]
        self._update_peak()
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._entry(leaf.untyped_storage())
        self._update_peak(workspace_bytes(func, args))
        return out

    def _entry(self, storage: Any) -> list[Any]:  # kind, bytes
        address = storage._cdata
        if address not in self._storages:
            entry = [self.kind, storage.nbytes()]
            self.alive[self.kind] += entry[1]

            def freed(_: Any) -> None:
                del self._storages[address]
                self.alive[entry[0]] -= entry[1]

            self._storages[address] = weakref.ref(storage, freed), entry
        return self._storages[address][1]

    def _update_peak(self, workspace: int = 0) -> None:
        """Notes a new peak; the last operator held ``workspace`` bytes beyond its tensors."""
        if sum(self.alive.values()) + workspace > self.peak:
            self.at_peak = self.alive.copy()
            self.at_peak[self.kind] += workspace


def workspace_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator allocates and frees while it runs on a GPU.

    Without data its kernels allocate nothing. The two operators that never keep logits hold one
    slice of them; the backward also sums the gradient of the hidden states in fp32.
    """
    forward = func is torch.ops.npo_fast.linear_log_probs.default
    if not forward and func is not torch.ops.npo_fast.linear_log_probs_backward.default:
        return 0
    hidden, weight = args[:2] if forward else args[1:3]
    logits = min(SLICE_BYTES, hidden.element_size() * len(hidden) * len(weight))
    return logits + (0 if forward else 4 * hidden.numel())


class FlashAttention(TorchFunctionMode):
    """Makes attention keep output and logsumexp alone, as every fused kernel does.

    On tensors without data PyTorch would take the unfused path, whose score matrix no run has.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = _flash if func is F.scaled_dot_product_attention else func
        return call(*args, **kwargs or {})


def _flash(
    query: Tensor,  # (B, heads, L, dim)
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return out
