"""What a run puts on the disk, from the shapes and dtypes of its model: nothing is written."""

from dataclasses import dataclass
from typing import Any

import torch

from npo_fast.planner.memory import state_bytes
from npo_fast.trainer.optimizers import Optimizer


@dataclass(frozen=True)
class SavedBytes:
    """Bytes of each folder that a run saves its model in."""

    model: int
    """The final model, or its adapter."""
    weights: int
    """The same as it trains: the best evaluated one, and a part of a checkpoint."""
    checkpoint: int
    """The weights with the optimizer's states: what it takes to go on."""

    def peak(self, checkpoints: int, keeps_best: bool) -> int:
        """The most that lies there at a time.

        A new checkpoint, or best model, is complete before the one that it replaces goes.
        """
        kept, best = min(checkpoints, 1) * self.checkpoint, keeps_best * self.weights
        moments = (
            kept + best + self.model,
            min(checkpoints, 2) * self.checkpoint + best,
            kept + 2 * best,
        )
        return max(moments)


def saved_bytes(
    model: Any,
    optimizer: Optimizer,
    dtype: torch.dtype | None = None,
    merge: bool = False,
    beside: int = 0,
) -> SavedBytes:
    """Bytes that saving ``model`` takes.

    Args:
        model: a transformers or peft model; on the meta device it does.
        dtype: of the final model's files, where it is not that of the model.
        merge: whether the final model has its adapter in whole weights.
        beside: bytes of tokenizer and configurations, which each folder has too.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    states = sum(state_bytes(p, optimizer) + 1024 for p in trained)  # and names, in pickle's words
    weights = weights_bytes(model) + beside
    final = weights_bytes(model, dtype, merge) + beside
    return SavedBytes(final, weights, weights + states)


def weights_bytes(model: Any, dtype: torch.dtype | None = None, merge: bool = False) -> int:
    """Bytes of a model's files, or of its adapter's; tied weights lie there once.

    ``dtype`` replaces that of the LM head wherever a weight has it.
    """
    is_adapter = hasattr(model, "get_base_model")
    if is_adapter and not merge:
        return sum(p.nbytes for p in model.parameters() if p.requires_grad)
    own = model.get_output_embeddings().weight.dtype
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    whole = (t for t in tensors if not (is_adapter and t.requires_grad))
    return sum(
        t.numel() * (dtype.itemsize if dtype and t.dtype == own else t.itemsize) for t in whole
    )
