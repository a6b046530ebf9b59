"""Every shipped kernel as it is compiled for a target: the list that ``offline`` inspects.

Bytes are those that a kernel moves between memory and the chip in one step over ``PROBLEM``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from npo_fast.kernels.triton import config, label_logits, npo_head, row_kl, row_log_probs, scale
from npo_fast.kernels.triton.npo_head import npo_head_kernel
from npo_fast.kernels.triton.slices import JOIN, slice_sums_kernel

N, D, V = PROBLEM = 4096, 4096, 128256  # tokens, width, vocabulary of Llama 3 8B
HALF = 2  # bytes of bf16
FEW_WARPS = {"num_warps": 4}  # of kernels that take next to no time


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time constants and launch options for one target."""

    function: Any  # triton.JITFunction
    name: str  # what the constants switch on
    target: str
    constants: dict[str, Any]
    options: dict[str, int]
    moved_bytes: float = 0.0  # over PROBLEM; 0: next to nothing
    dtype: str = "bf16"

    @property
    def kernel(self) -> str:
        """The name of the kernel."""
        return self.function.__name__.removesuffix("_kernel")

    @property
    def config(self) -> str:
        """Block sizes and launch options, as text."""
        blocks = [n for key, n in self.constants.items() if key.startswith("BLOCK")]
        launch = " ".join(f"{key.removeprefix('num_')} {n}" for key, n in self.options.items())
        return f"{'x'.join(map(str, blocks))}, {launch}"


def variants(target: str) -> Iterator[Variant]:
    """Yields all variants for ``target``."""
    row = config.ROW[target]
    options = {"num_warps": row.num_warps}
    tile = {"BLOCK_R": row.block_rows, "BLOCK_C": row.block_columns}
    kl_tile = {**tile, "BLOCK_C": row.kl_block_columns}
    gradient, kl, once = row_log_probs.gradient_kernel, row_kl.row_kl_kernel, 1.0 * N * V * HALF
    for capped in (False, True):
        name, softcap = ("softcap" if capped else "plain"), {"SOFTCAP": capped}
        caps = {**softcap, "REF_SOFTCAP": capped}
        for labels in (False, True):
            constants = {"HAS_LABELS": labels, **softcap, **tile}
            label = f"{name}, labels" if labels else name
            yield Variant(slice_sums_kernel, label, target, constants, options, once)
        yield Variant(row_log_probs.label_kernel, name, target, {**softcap, **JOIN}, FEW_WARPS)
        yield Variant(gradient, name, target, {**softcap, **tile}, options, 2 * once)
        yield Variant(kl, name, target, {**caps, **kl_tile}, options, 3 * once)
    yield Variant(row_kl.join_kernel, "plain", target, {**JOIN}, FEW_WARPS)
    for bias in (False, True):
        constants = {"HAS_BIAS": bias, "BLOCK": label_logits.BLOCK}
        name = "bias" if bias else "plain"
        yield Variant(label_logits.label_logits_kernel, name, target, constants, FEW_WARPS)
    constants = {"BLOCK": scale.BLOCK}
    yield Variant(scale.scale_kernel, "plain", target, constants, FEW_WARPS, 2.0 * V * D * HALF)
    constants = {"BLOCK": npo_head.BLOCK}
    yield Variant(npo_head_kernel, "plain", target, constants, FEW_WARPS, 8.0 * N)
    # fp32 logits, of all options at once
    every_option = {"SOFTCAP": True, "REF_SOFTCAP": True, "HAS_LABELS": True}
    for function, blocks in ((slice_sums_kernel, tile), (gradient, tile), (kl, kl_tile)):
        switches = {k: v for k, v in every_option.items() if k in function.arg_names}
        constants = {**switches, **blocks}
        yield Variant(function, "softcap", target, constants, options, dtype="fp32")
