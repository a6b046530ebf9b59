"""What the public operators are given: UserErrors that name the shape or value; autocast."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from npo_fast.errors import UserError
from npo_fast.kernels import cpu
from npo_fast.kernels.transform import HeadTransform, check_transform
from npo_fast.ops.derivatives import check_derivatives

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
        UserError: shapes, dtypes, devices and transform do not fit together.
    """
    check_tensors(op, **{f"{prefix}hidden": hidden, f"{prefix}weight": weight})
    if bias is not None:
        check_tensors(op, **{f"{prefix}bias": bias})
    check_derivatives(op, hidden, weight, bias)
    if hidden.is_cpu and not torch.compiler.is_compiling():
        cpu.tell_if_absent()
    device = hidden.device.type
    autocast = device in WITH_AUTOCAST and torch.is_autocast_enabled(device)
    if autocast and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise UserError(
            f"{op}: {prefix}hidden must be (N, D) and {prefix}weight (V, D) with the same D, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}{shape_hint(hidden, weight)}"
        )
    if not len(weight):
        raise UserError(
            f"{op}: {prefix}weight must have a row for each token of a vocabulary, got "
            f"{tuple(weight.shape)}"
        )
    if hidden.dtype not in DTYPES or hidden.dtype != weight.dtype:
        raise UserError(
            f"{op}: {prefix}hidden and {prefix}weight must have one dtype of float32, bfloat16, "
            f"float16 or float64, got {hidden.dtype} and {weight.dtype}; autocast casts both, "
            "outside of it cast one, such as hidden.to(weight.dtype)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"{op}: {prefix}bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    check_transform(op, transform, prefix)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_device(op, f"{prefix}hidden", hidden, f"{prefix}{name}", tensor)
    if constant or not torch.is_grad_enabled():  # autograd functions look at requires_grad alone
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    return hidden, weight, bias


def check_tensors(op: str, **arguments: object) -> None:
    """Raises UserError for the first argument that is no tensor, and says what to pass."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UserError(f"{op}: {name} must be a tensor, got {kind}{_in_its_place(value)}")
        if hasattr(value, "full_tensor"):  # DTensor, of FSDP or tensor parallelism
            raise UserError(
                f"{op}: {name} is sharded over processes; pass all of it, {name}.full_tensor()"
            )


def _in_its_place(value: Any) -> str:
    """What was probably meant by an argument that is no tensor."""
    if hasattr(value, "get_output_embeddings"):
        return "; npo_fast.head_of(model) has the weight and bias of its LM head"
    if isinstance(getattr(value, "weight", None), Tensor):
        and_bias = " (and its .bias as bias)" if getattr(value, "bias", None) is not None else ""
        return f"; pass its .weight{and_bias}"
    if getattr(value, "last_hidden_state", None) is not None:
        return "; pass its .last_hidden_state"
    if hasattr(value, "logits"):
        return "; pass hidden states, model.get_decoder()(input_ids=…).last_hidden_state"
    if isinstance(value, tuple | list) and value and isinstance(value[-1], Tensor):
        return "; pass the last of them, such as hidden_states[-1]"
    is_array = hasattr(value, "__len__") and not isinstance(value, str)
    return "; torch.as_tensor makes one" if is_array else ""


def shape_hint(hidden: Tensor, weight: Tensor) -> str:
    """What was probably meant by shapes of hidden states and weight that do not fit."""
    if not hidden.is_floating_point():
        return "; hidden are whole numbers: pass hidden states, not token ids"
    if weight.dim() > 2 and hidden.dim() == 2:
        return "; hidden and weight look swapped"
    if weight.dim() == 2 and hidden.dim() and hidden.shape[-1] == len(weight) != weight.shape[1]:
        if len(weight) > weight.shape[1]:
            return "; these look like logits: pass the last hidden states, which the head reads"
        return "; weight looks transposed: pass it as torch.nn.Linear has it"
    if hidden.dim() == 3 and hidden.shape[-1] == weight.shape[-1]:
        return "; for a padded batch there are sequence_log_probs and the FusedLinear modules"
    return ""


def check_labels(op: str, hidden: Tensor, labels: Tensor, weight: Tensor) -> None:
    """Raises UserError unless labels are (N,) int64 or int32 on the device of ``hidden``."""
    check_tensors(op, labels=labels)
    if labels.shape != hidden.shape[:1]:
        hint = ""
        if labels.shape == weight.shape[:1]:
            hint = "; hidden and weight look swapped"
        elif labels.dim() == 1 and len(labels) == len(hidden) + 1:
            hint = "; a row predicts the next token: pass labels[1:]"
        raise UserError(
            f"{op}: labels must be ({hidden.shape[0]},), one a row of hidden, "
            f"got {tuple(labels.shape)}{hint}"
        )
    check_label_dtype(op, "labels", labels)
    check_device(op, "hidden", hidden, "labels", labels)


def check_label_dtype(op: str, name: str, labels: Tensor) -> None:
    """Raises UserError unless labels are int64 or int32."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise UserError(
            f"{op}: {name} must be int64 or int32, got {labels.dtype}; {name}.long() casts token "
            "ids"
        )


def check_device(op: str, name: str, tensor: Tensor, other: str, moved: Tensor | None) -> None:
    """Raises UserError where ``moved`` is not on the device of ``tensor``."""
    if moved is not None and moved.device != tensor.device:
        raise UserError(
            f"{op}: {name} is on {tensor.device} but {other} on {moved.device}; "
            f"move {other} with {other}.to({str(tensor.device)!r})"
        )


def check_label_values(op: str, labels: Tensor, vocabulary: int) -> None:
    """Raises UserError where a label is outside [0, vocabulary).

    It reads values, so compiled graphs call it inside an operator only. On a GPU the device raises.
    """
    inside = ((labels >= 0) & (labels < vocabulary)).all()
    if labels.device.type == "cuda":
        # no host synchronisation: the device raises when it evaluates this
        torch._assert_async(inside, f"{op}: a label is outside [0, {vocabulary})")
    elif labels.device.type == "cpu" and not bool(inside):
        row = int(((labels < 0) | (labels >= vocabulary)).nonzero()[0])
        raise UserError(
            f"{op}: labels[{row}] = {int(labels[row])} is outside the vocabulary "
            f"[0, {vocabulary}); drop ignored positions such as -100 before the call"
        )


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: no tensor can be read, host values are frozen."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_cu_seqlens(op: str, cu_seqlens: Tensor, rows: int, device: torch.device) -> None:
    """Raises UserError unless offsets are (S + 1,) integers that rise from 0 to ``rows``."""
    check_tensors(op, cu_seqlens=cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise UserError(f"{op}: cu_seqlens must be (S + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise UserError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device and cu_seqlens.device.type != "cpu":
        raise UserError(
            f"{op}: hidden is on {device} but cu_seqlens on {cu_seqlens.device}; "
            f"move it to {device} or the CPU"
        )
    if torch.compiler.is_compiling():  # a graph reads values when it runs
        return
    if cu_seqlens.is_cpu and capturing(device):
        raise UserError(
            f"{op}: a CUDA graph would replay the cu_seqlens of its capture; keep them in a tensor "
            f"on {device}"
        )
    well_formed = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == rows) & (cu_seqlens.diff() >= 0).all()
    if cu_seqlens.device.type == "cuda":
        torch._assert_async(well_formed, f"{op}: cu_seqlens must rise from 0 to {rows}")
    elif cu_seqlens.device.type == "cpu" and not bool(well_formed):
        shown = ", ".join(str(int(offset)) for offset in cu_seqlens[:8])
        lengths = "; of lengths make F.pad(lengths.cumsum(0), (1, 0))"
        raise UserError(
            f"{op}: cu_seqlens must rise from 0 to the {rows} rows of hidden, "
            f"got [{shown}{', …' if len(cu_seqlens) > 8 else ''}]"
            f"{lengths if int(cu_seqlens.sum()) == rows else ''}"
        )


def check_loss(op: str, loss: Any) -> None:
    """Raises UserError unless ``loss`` follows ``SequenceLoss``."""
    if isinstance(loss, type):
        raise UserError(f"{op}: loss is the class {loss.__name__}; make one, {loss.__name__}()")
    if getattr(loss, "reference", None) == "hidden":
        raise UserError(
            f"{op}: {type(loss).__name__} compares whole distributions, not log-probs of labels; "
            "linear_kl and FusedLinearKLLoss do"
        )
    if not (callable(loss) and hasattr(loss, "group") and hasattr(loss, "reference")):
        raise UserError(
            f"{op}: loss must be NPO(beta), a sibling, or follow SequenceLoss, got {loss!r}"
        )


def check_ref_log_probs(
    op: str, loss: object, ref_log_probs: Tensor | None, sequences: int, hidden: Tensor
) -> None:
    """Raises UserError where the loss needs a reference that is missing or of another shape."""
    reference, name = getattr(loss, "reference", None), type(loss).__name__
    if reference is None:
        return
    if ref_log_probs is None:
        raise UserError(
            f"{op}: {name} compares with a reference: pass ref_log_probs, the log-probs of the "
            "same labels under the model before training"
        )
    check_tensors(op, ref_log_probs=ref_log_probs)
    expected = sequences if reference == "sequence" else len(hidden)
    if ref_log_probs.shape != (expected,):
        raise UserError(
            f"{op}: {name} needs ref_log_probs of shape ({expected},), one a {reference}, "
            f"got {tuple(ref_log_probs.shape)}"
        )
    check_device(op, "hidden", hidden, "ref_log_probs", ref_log_probs)


def check_ref_values(op: str, loss: object, ref_log_probs: Tensor | None) -> None:
    """Raises UserError where a reference is no number that the loss can compare with.

    A token may have log-prob -inf, a sequence not: its loss has no value. Reads values, as
    ``check_label_values`` does.
    """
    reference = getattr(loss, "reference", None)
    if ref_log_probs is None or reference is None:
        return
    sound = ref_log_probs < torch.inf  # NaN is not
    if reference == "sequence":
        sound = sound & (ref_log_probs > -torch.inf)
    if ref_log_probs.device.type == "cuda":
        torch._assert_async(sound.all(), f"{op}: ref_log_probs are not finite")
    elif ref_log_probs.device.type == "cpu" and not bool(sound.all()):
        index = int((~sound).nonzero()[0])
        raise UserError(
            f"{op}: ref_log_probs[{index}] = {float(ref_log_probs[index])}: the reference gives a "
            f"label of this {reference} no probability, or is broken; drop the {reference}"
        )
