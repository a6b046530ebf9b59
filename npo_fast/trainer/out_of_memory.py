"""When a micro-batch does not fit: which errors say so, and how much smaller the next one is."""

from collections.abc import Iterable

import torch

from npo_fast.errors import OutOfMemory

_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def halved(micro_batch_tokens: int, units: Iterable[int], step: int, reason: str) -> int:
    """Half of the tokens that one micro-batch of the step had, but never less than its longest.

    Args:
        units: tokens of each sequence of the step, or of each pair where pairs stay whole.

    Raises:
        OutOfMemory: the largest micro-batch was one sequence already.
    """
    units = list(units)
    longest = max(units)
    if micro_batch_tokens <= longest:
        raise OutOfMemory(
            f"step {step}: out of memory with one sequence of {longest} tokens at a time "
            f"({reason}); the weights stay those of step {step - 1}. Free memory that other "
            "programs hold, add --gradient-checkpointing, cut sequences with a smaller "
            "--max-length, or load half precision with --dtype bf16"
        )
    return max(longest, min(micro_batch_tokens, sum(units)) // 2)
