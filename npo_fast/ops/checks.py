"""What the public operators are given: ValueErrors that name the shape or value; autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from npo_fast.kernels.transform import HeadTransform, check_transform

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# computed at import: torch.compile of PyTorch 2.11 cannot ask
DEVICES = ("cpu", "cuda", "xpu", "mps", "meta")
WITH_AUTOCAST = frozenset(name for name in DEVICES if torch.amp.is_autocast_available(name))


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Returns a context without autocast on the device of ``tensor``.

    The operators choose the dtype of each GEMM, and fp32 sums must stay fp32.
    """
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if device in WITH_AUTOCAST else nullcontext()


def checked_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: HeadTransform,
    prefix: str = "",
    constant: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the tensors of a head as its operator takes them.

    Where autocast is on they are cast as ``torch.nn.functional.linear`` casts them; gradients pass
    through. They are detached where ``constant`` or where gradients are off. ``prefix`` stands
    before the names of the arguments in the messages.

    Raises:
        ValueError: shapes, dtypes, devices and transform do not fit together.
    """
    device = hidden.device.type
    autocast = device in WITH_AUTOCAST and torch.is_autocast_enabled(device)
    if autocast and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: {prefix}hidden must be (N, D) and {prefix}weight (V, D) with the same D, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype not in DTYPES or hidden.dtype != weight.dtype:
        raise ValueError(
            f"{op}: {prefix}hidden and {prefix}weight must have one dtype of float32, bfloat16, "
            f"float16 or float64, got {hidden.dtype} and {weight.dtype} (autocast casts both)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: {prefix}bias must be ({weight.shape[0]},), got {tuple(bias.shape)}"
        )
    check_transform(op, transform, prefix)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_device(op, f"{prefix}hidden", hidden, f"{prefix}{name}", tensor)
    if constant or not torch.is_grad_enabled():  # autograd functions look at requires_grad alone
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    return hidden, weight, bias


def check_labels(op: str, hidden: Tensor, labels: Tensor) -> None:
    """Raises ValueError unless labels are (N,) int64 or int32 on the device of ``hidden``."""
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"{op}: labels must be ({hidden.shape[0]},), one a row of hidden, "
            f"got {tuple(labels.shape)}"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: labels must be int64 or int32, got {labels.dtype}")
    check_device(op, "hidden", hidden, "labels", labels)


def check_device(op: str, name: str, tensor: Tensor, other: str, moved: Tensor | None) -> None:
    """Raises ValueError where ``moved`` is not on the device of ``tensor``."""
    if moved is not None and moved.device != tensor.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device} but {other} on {moved.device}; "
            f"move {other} with {other}.to({str(tensor.device)!r})"
        )


def check_label_values(op: str, labels: Tensor, vocabulary: int) -> None:
    """Raises ValueError where a label is outside [0, vocabulary).

    It reads values, so compiled graphs call it inside an operator only. On a GPU the device raises.
    """
    inside = ((labels >= 0) & (labels < vocabulary)).all()
    if labels.device.type == "cuda":
        # no host synchronisation: the device raises when it evaluates this
        torch._assert_async(inside, f"{op}: a label is outside [0, {vocabulary})")
    elif labels.device.type == "cpu" and not bool(inside):
        row = int(((labels < 0) | (labels >= vocabulary)).nonzero()[0])
        raise ValueError(
            f"{op}: labels[{row}] = {int(labels[row])} is outside the vocabulary "
            f"[0, {vocabulary}); drop ignored positions such as -100 before the call"
        )


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: no tensor can be read, host values are frozen."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_cu_seqlens(op: str, cu_seqlens: Tensor, rows: int, device: torch.device) -> None:
    """Raises ValueError unless offsets are (S + 1,) integers that rise from 0 to ``rows``."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{op}: cu_seqlens must be (S + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device and cu_seqlens.device.type != "cpu":
        raise ValueError(
            f"{op}: hidden is on {device} but cu_seqlens on {cu_seqlens.device}; "
            f"move it to {device} or the CPU"
        )
    if torch.compiler.is_compiling():  # a graph reads values when it runs
        return
    if cu_seqlens.is_cpu and capturing(device):
        raise ValueError(
            f"{op}: a CUDA graph would replay the cu_seqlens of its capture; keep them in a tensor "
            f"on {device}"
        )
    well_formed = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == rows) & (cu_seqlens.diff() >= 0).all()
    if cu_seqlens.device.type == "cuda":
        torch._assert_async(well_formed, f"{op}: cu_seqlens must rise from 0 to {rows}")
    elif cu_seqlens.device.type == "cpu" and not bool(well_formed):
        shown = ", ".join(str(int(offset)) for offset in cu_seqlens[:8])
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to the {rows} rows of hidden, "
            f"got [{shown}{', …' if len(cu_seqlens) > 8 else ''}]"
        )


def check_ref_log_probs(
    op: str, loss: object, ref_log_probs: Tensor | None, sequences: int, hidden: Tensor
) -> None:
    """Raises ValueError where the loss needs a reference that is missing or of another shape."""
    reference, name = getattr(loss, "reference", None), type(loss).__name__
    if reference is None:
        return
    if ref_log_probs is None:
        raise ValueError(f"{op}: {name} compares with a reference: pass ref_log_probs")
    expected = sequences if reference == "sequence" else len(hidden)
    if ref_log_probs.shape != (expected,):
        raise ValueError(
            f"{op}: {name} needs ref_log_probs of shape ({expected},), one a {reference}, "
            f"got {tuple(ref_log_probs.shape)}"
        )
    check_device(op, "hidden", hidden, "ref_log_probs", ref_log_probs)
