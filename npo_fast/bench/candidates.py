"""Implementations of the loss: this package, plain PyTorch, and peers as their users call them.

A peer computes NPO if it returns token log-probs, else its own NLL: both need the same three GEMMs.
Peers are imported only here and only on request; a missing one is reported with the reason.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast import NLL, linear_sequence_loss, npo_loss
from npo_fast.bench.fp64_oracle import npo
from npo_fast.bench.inputs import BETA, Inputs
from npo_fast.errors import UserError

OURS = "npo_fast"


@dataclass(frozen=True)
class Candidate:
    """One implementation of a loss; of several options of a peer the fastest is reported."""

    peer: str
    loss: str  # NPO or NLL
    run: Callable[[Inputs], Tensor]  # a scalar, differentiable in hidden and weight
    option: str = ""
    whole_logits: bool = False

    @property
    def key(self) -> str:
        """A name that is unique among candidates."""
        return " ".join(part for part in (self.peer, self.loss, self.option) if part)


def find_candidates(
    device: torch.device, peers: Iterable[str] | None = None
) -> tuple[list[Candidate], dict[str, str]]:
    """Our own candidates and those of the named peers (None: all); why others are missing."""
    names = list(_PEERS) if peers is None else list(peers)
    candidates, missing = [*_ours()], {}
    for name in names:
        if name not in _PEERS:
            raise UserError(f"unknown peer {name!r}; known: {', '.join(_PEERS)}")
        try:
            candidates += _PEERS[name](device)
        except ImportError as error:
            missing[name] = str(error)
    return candidates, missing


def candidate_by_key(key: str, device: torch.device) -> Candidate:
    """The candidate with this ``key``."""
    peers = [name for name in _PEERS if key.startswith(f"{name} ")]
    return next(c for c in find_candidates(device, peers)[0] if c.key == key)


def _ours() -> Iterator[Candidate]:
    def run_npo(inputs: Inputs) -> Tensor:
        return npo_loss(*inputs.head, inputs.cu_seqlens, inputs.ref_log_probs, BETA)

    def run_nll(inputs: Inputs) -> Tensor:
        arguments = *inputs.head, inputs.cu_seqlens, NLL()
        return linear_sequence_loss(*arguments, reduction="token_mean")[0]

    yield Candidate(OURS, "NPO", run_npo)
    yield Candidate(OURS, "NLL", run_nll)


def _plain(device: torch.device) -> Iterator[Candidate]:
    def run_npo(inputs: Inputs) -> Tensor:
        logits = inputs.hidden @ inputs.weight.T
        log_probs = F.log_softmax(logits.float(), dim=-1)
        return npo(log_probs.gather(1, inputs.labels[:, None]).squeeze(1), inputs)

    def run_nll(inputs: Inputs) -> Tensor:
        return F.cross_entropy((inputs.hidden @ inputs.weight.T).float(), inputs.labels)

    yield Candidate("plain", "NPO", run_npo, whole_logits=True)
    yield Candidate("plain", "NLL", run_nll, whole_logits=True)


def _torch_linear_cross_entropy(device: torch.device) -> Iterator[Candidate]:
    function: Any = getattr(F, "linear_cross_entropy", None)
    make_options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or make_options is None:
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")

    def run(settings: dict[str, Any], inputs: Inputs) -> Tensor:
        return function(*inputs.head, options=make_options(**settings))

    yield Candidate("torch-lce", "NLL", partial(run, {}), "auto")
    for rows in (128, 512):
        settings = {"chunking_method": None, "batch_chunk_size": rows}
        yield Candidate("torch-lce", "NLL", partial(run, settings), f"rows={rows}")


def _trl(device: torch.device) -> Iterator[Candidate]:
    function = _module("trl.kernels.chunked_logprob", "trl").ChunkedLogProbFunction
    _module("trl.trainer.utils", "trl")  # its backward pass needs it: import before the clock runs

    def run(columns: int, inputs: Inputs) -> Tensor:
        log_probs, *_ = function.apply(
            inputs.hidden, inputs.weight, None, inputs.labels, 1.0, columns, None, 1.0, ()
        )
        return npo(log_probs, inputs)

    for n in (8192, 32768):  # its trainers: 32768
        yield Candidate("trl", "NPO", partial(run, n), f"columns={n}")


def _cut_cross_entropy(device: torch.device) -> Iterator[Candidate]:
    function = _module("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy

    def run(implementation: str, inputs: Inputs) -> Tensor:
        losses = function(*inputs.head, reduction="none", impl=implementation)
        return npo(-losses.float(), inputs)

    yield Candidate("cce", "NPO", partial(run, "torch_compile"), "torch_compile", whole_logits=True)
    if device.type == "cuda":
        yield Candidate("cce", "NPO", partial(run, "cce"), "cce")


def _liger(device: torch.device) -> Iterator[Candidate]:
    """On a GPU its Triton kernel; elsewhere the chunked log-probs inside its GRPO loss."""
    if device.type == "cuda":
        fused = _module("liger_kernel.transformers.functional", "liger-kernel")

        def run_nll(inputs: Inputs) -> Tensor:
            result = fused.liger_fused_linear_cross_entropy(*inputs.head)
            return result[0] if isinstance(result, tuple) else result

        yield Candidate("liger", "NLL", run_nll, "fused linear CE")
        return
    module = _module("liger_kernel.chunked_loss.fused_linear_ppo", "liger-kernel")
    function = getattr(module, "_ChunkedSelectiveLogProbFunction", None)
    if function is None:
        raise ImportError("this liger-kernel has no chunked log-probs that run on a CPU")

    def run_npo(columns: int, inputs: Inputs) -> Tensor:
        return npo(function.apply(*inputs.head, None, 1.0, columns), inputs)

    for n in (4096, 16384):  # its default: 4096
        yield Candidate("liger", "NPO", partial(run_npo, n), f"GRPO log-probs, columns={n}")


def _module(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
            raise ImportError(f"not installed (pip install {package})") from error
        raise ImportError(f"{package} does not import: {error}") from error


_PEERS: Mapping[str, Callable[[torch.device], Iterator[Candidate]]] = {
    "plain": _plain,
    "torch-lce": _torch_linear_cross_entropy,
    "trl": _trl,
    "cce": _cut_cross_entropy,
    "liger": _liger,
}
