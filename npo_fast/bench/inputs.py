"""Problems to time: a head, rows that predict labels, and how far training has come.

random      logits without structure, r_i near 0: the first step
memorised   log-probs near 0: most of the gradient is rounding if it is computed carelessly
forgotten   log-probs far below the reference: every loss weight is nearly 0
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from npo_fast import linear_log_probs
from npo_fast.errors import UserError
from npo_fast.ops import segment_sum
from npo_fast.validation import Checked, PositiveInt

Kind = Literal["random", "memorised", "forgotten"]
Dtype = Literal["float32", "bfloat16"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BETA = 0.1


@dataclass(frozen=True)
class Shape(Checked):
    """Size of one problem."""

    name: str
    rows: PositiveInt  # N, tokens that carry a loss
    width: PositiveInt  # D
    vocabulary: PositiveInt  # V
    sequences: PositiveInt  # S
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequences > self.rows:
            raise UserError(f"--sequences {self.sequences} is more than --rows {self.rows}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as PyTorch has it."""
        return getattr(torch, self.dtype)

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits as a whole."""
        return self.rows * self.vocabulary * self.torch_dtype.itemsize

    @property
    def gradients_bytes(self) -> int:
        """Bytes of the gradients of hidden and weight, which a training step returns."""
        return (self.rows + self.vocabulary) * self.width * self.torch_dtype.itemsize

    @property
    def gemm_flops(self) -> float:
        """Flops of one GEMM; a loss with gradients takes three."""
        return 2.0 * self.rows * self.width * self.vocabulary


SHAPES = (
    Shape("small-lm", rows=2048, width=576, vocabulary=49152, sequences=32),
    Shape("llama", rows=512, width=2048, vocabulary=128256, sequences=8),
)


@dataclass(frozen=True)
class Inputs:
    """Arguments of a loss."""

    shape: Shape
    hidden: Tensor  # (N, D), wants a gradient
    weight: Tensor  # (V, D), wants a gradient
    labels: Tensor  # (N,)
    cu_seqlens: Tensor  # (S + 1,) int32
    sequence_of: Tensor  # (N,) the sequence of each row
    ref_log_probs: Tensor  # (S,) fp32

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, weight and labels: what every loss takes first."""
        return self.hidden, self.weight, self.labels


def make_inputs(shape: Shape, kind: Kind, device: torch.device) -> Inputs:
    """Draws a problem of this shape and kind."""
    random = torch.Generator(device).manual_seed(0)
    empty = partial(torch.empty, dtype=shape.torch_dtype, device=device)
    weight = empty(shape.vocabulary, shape.width).normal_(std=shape.width**-0.5, generator=random)
    hidden = empty(shape.rows, shape.width).normal_(generator=random)
    labels = torch.randint(shape.vocabulary, (shape.rows,), generator=random, device=device)
    if kind == "memorised":  # a head row times itself is about 1: the label leads by 10
        hidden.mul_(0.1).add_(weight[labels], alpha=math.log(shape.vocabulary) + 10)
    cu_seqlens = _cu_seqlens(shape, random, device)
    lengths = cu_seqlens.diff()
    sequence_of = torch.arange(shape.sequences, device=device).repeat_interleave(lengths)
    log_probs = segment_sum(linear_log_probs(hidden, weight, labels), cu_seqlens)
    noise = torch.empty_like(log_probs).normal_(generator=random)
    ref = log_probs + (30 / BETA if kind == "forgotten" else noise)
    return Inputs(
        shape, hidden.requires_grad_(), weight.requires_grad_(), labels, cu_seqlens,
        sequence_of, ref,
    )  # fmt: skip


def _cu_seqlens(shape: Shape, random: torch.Generator, device: torch.device) -> Tensor:
    """Offsets of sequences between half and one and a half times the mean length."""
    shares = 0.5 + torch.rand(shape.sequences, generator=random, device=device)
    spare = shape.rows - shape.sequences  # every sequence has one token at least
    ends = (shares.cumsum(0) / shares.sum() * spare).round().long()
    ends += torch.arange(1, shape.sequences + 1, device=device)
    return torch.cat([ends.new_zeros(1), ends]).int()
