"""Every shipped kernel as it is compiled for a target: the list that ``offline`` inspects.

Bytes are those that a kernel moves between memory and the chip in one step over ``PROBLEM``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from npo_fast.kernels.triton import config, label_logits, npo_head, row_kl, row_log_probs, scale
from npo_fast.kernels.triton.npo_head import npo_head_kernel
from npo_fast.kernels.triton.slices import slice_sums_kernel

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
    blocks = {"BLOCK_R": row.block_rows, "BLOCK_C": row.block_columns}
    kl_blocks = {**blocks, "BLOCK_C": row.kl_block_columns}
    options = {"num_warps": row.num_warps}
    once, joined = N * V * HALF, {"BLOCK_R": row_log_probs.ROWS, "BLOCK_S": row_log_probs.SLICES}
    for capped in (False, True):
        name, softcap = ("softcap" if capped else "plain"), {"SOFTCAP": capped}
        for labels in (False, True):
            constants = {"HAS_LABELS": labels, **softcap, **blocks}
            label = f"{name}, labels" if labels else name
            yield Variant(slice_sums_kernel, label, target, constants, options, 1.0 * once)
        yield Variant(row_log_probs.label_kernel, name, target, {**softcap, **joined}, FEW_WARPS)
        constants = {**softcap, **blocks}
        gradient = row_log_probs.gradient_kernel
        yield Variant(gradient, name, target, constants, options, 2.0 * once)
        constants = {**constants, **kl_blocks, "REF_SOFTCAP": capped}
        yield Variant(row_kl.row_kl_kernel, name, target, constants, options, 3.0 * once)
    yield Variant(row_kl.join_kernel, "plain", target, joined, FEW_WARPS)
    for bias in (False, True):
        constants = {"HAS_BIAS": bias, "BLOCK": label_logits.BLOCK}
        name = "bias" if bias else "plain"
        yield Variant(label_logits.label_logits_kernel, name, target, constants, FEW_WARPS)
    moved = 2.0 * V * D * HALF
    constants = {"BLOCK": scale.BLOCK}
    yield Variant(scale.scale_kernel, "plain", target, constants, FEW_WARPS, moved)
    constants = {"BLOCK": npo_head.BLOCK}
    yield Variant(npo_head_kernel, "plain", target, constants, FEW_WARPS, 8.0 * N)
    # fp32 logits, of all options at once
    for function in (slice_sums_kernel, row_log_probs.gradient_kernel, row_kl.row_kl_kernel):
        names = [name for name in function.arg_names if name in ("SOFTCAP", "REF_SOFTCAP")]
        tile = kl_blocks if function is row_kl.row_kl_kernel else blocks
        constants = {**dict.fromkeys(names, True), **tile}
        if "HAS_LABELS" in function.arg_names:
            constants["HAS_LABELS"] = True
        yield Variant(function, "softcap", target, constants, options, dtype="fp32")
