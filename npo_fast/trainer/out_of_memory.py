"""When memory runs out: which errors say so, and what can be done about it."""

import json

import torch
import torch.distributed as dist

from npo_fast.data import Sources
from npo_fast.distributed import announce, announced, leave
from npo_fast.errors import (
    OutOfMemory,
    PartialUpdateOutOfMemory,
    SharedOutOfMemory,
    first_line,
)
from npo_fast.methods import Term
from npo_fast.model.causal_lm import CausalLM
from npo_fast.trainer.order import batch_keys
from npo_fast.trainer.settings import TrainSettings
from npo_fast.trainer.state import TrainState

SHORTAGE = "out of memory"
_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch or Python says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def smaller_micro_batches(
    lm: CausalLM,
    batch: Sources,
    terms: tuple[Term, ...],
    settings: TrainSettings,
    state: TrainState,
    reason: str,
) -> int:
    """Tokens of the micro-batches with which a step that did not fit can be tried again.

    Half of what the largest micro-batch had, but no less than the longest sequence or pair.

    Raises:
        OutOfMemory: the micro-batch was one sequence already, or the step must stay one
            micro-batch.
    """
    step, tokens = state.step + 1, state.micro_batch_tokens
    assert tokens is not None
    if settings.step_in_backward:
        raise OutOfMemory(_whole_step_message(step, reason))
    lengths = [
        sum(len(example.input_ids) for example in unit)
        for key in batch_keys(terms)
        for unit in zip(*(batch[name] for name in key), strict=True)
    ]
    longest = max(lengths)
    copied = ", or leave out --sharpness-rho, which copies the weights"
    if tokens <= longest:
        raise OutOfMemory(
            f"step {step}: out of memory with one sequence of {longest} tokens at a time "
            f"({reason}); the weights stay those of step {step - 1}. Free memory that other "
            "programs hold, add --gradient-checkpointing, cut sequences with a smaller "
            "--max-length, or load half precision with --dtype bf16"
            f"{copied if settings.sharpness_rho else ''}"
        )
    return max(longest, min(tokens, -(-sum(lengths) // lm.world_size)) // 2)


def tell_of_shortage(lm: CausalLM, step: int, tokens: int, reason: str) -> SharedOutOfMemory:
    """Tells the other processes that this one has no memory for a step; returns what all raise.

    They wait in a collective that this process does not reach: it leaves the group, which ends
    that. On GPUs they would go on waiting (NCCL tells them nothing): there all processes end.
    """
    if not ends_with_a_process():
        return SharedOutOfMemory(
            f"step {step}: out of memory ({reason}), and other GPUs wait for this one",
            tokens, meets=False,
        )  # fmt: skip
    announce(SHORTAGE, json.dumps([lm.rank, step, tokens, reason]))
    shortage = shortage_of_another()
    leave()
    assert shortage is not None
    return shortage


def ends_with_a_process() -> bool:
    """Whether a collective ends, with an error, where one of its processes leaves."""
    return dist.get_backend() == "gloo"


def shortage_of_another() -> SharedOutOfMemory | None:
    """What all raise where a process has told of a shortage."""
    told = announced(SHORTAGE)
    if told is None:
        return None
    rank, step, tokens, reason = json.loads(told)
    return SharedOutOfMemory(f"step {step}: out of memory on process {rank} ({reason})", tokens)


def update_out_of_memory(step: int, error: BaseException, started: bool) -> OutOfMemory:
    """What to raise where ``Update.apply`` does not fit, before or after it ``started``."""
    if not started:
        return OutOfMemory(_whole_step_message(step, first_line(error), " in the backward"))
    return PartialUpdateOutOfMemory(
        f"step {step}: out of memory in the optimizer's step ({first_line(error)}), which smaller "
        "micro-batches do not cure; add --optimizer adamw-8bit, --offload-optimizer, "
        "--step-in-backward (with a smaller --batch-size where it is there), or train an adapter "
        "with --lora-rank 16"
    )


def _whole_step_message(step: int, reason: str, where: str = "") -> str:
    return (
        f"step {step}: out of memory{where} ({reason}), and --step-in-backward takes a whole step "
        "at once; add --gradient-checkpointing or lower --batch-size"
    )
