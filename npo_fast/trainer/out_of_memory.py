"""When memory runs out: which errors say so, how much smaller the next micro-batch is, messages."""

from collections.abc import Iterable

import torch

from npo_fast.errors import OutOfMemory

_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch or Python says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def first_line(error: BaseException) -> str:
    """The reason that an error gives, without PyTorch's advice and traces below it."""
    return str(error).partition("\n")[0]


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


def whole_step_message(step: int, reason: str, where: str = "") -> str:
    """For a step that must go through the model at once; ``where`` may be " in the backward"."""
    return (
        f"step {step}: out of memory{where} ({reason}), and --step-in-backward takes a whole step "
        "at once; add --gradient-checkpointing or lower --batch-size"
    )


def several_processes_message(step: int, reason: str) -> str:
    """For a step that one of several processes cannot make."""
    return (
        f"step {step}: out of memory ({reason}), and several processes cannot make the step again "
        "alone; lower --micro-batch-tokens or add --gradient-checkpointing"
    )


def optimizer_message(step: int, reason: str) -> str:
    """For an update of the weights that does not fit."""
    return (
        f"step {step}: out of memory in the optimizer's step ({reason}), which smaller "
        "micro-batches do not cure; add --optimizer adamw-8bit, --offload-optimizer, "
        "--step-in-backward (with a smaller --batch-size where it is there), or train an adapter "
        "with --lora-rank 16"
    )
