"""Correct results in fp64, without our operators and without the logits as a whole.

The loss is exact over all rows. Gradients are exact at a sample of rows and of head rows: each
still depends on every logit of its row or column, at a few per cent of the cost.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_fast.bench.inputs import BETA, Inputs

SAMPLE = 16
SLICE_BYTES = 64 << 20  # of fp64 logits
TOLERANCE = {"float32": 5e-3, "bfloat16": 5e-2}


def npo(log_probs: Tensor, inputs: Inputs) -> Tensor:  # (N,) -> scalar
    """``mean_i -(2 / beta) logsigmoid(-beta * (l_i - ref_i))`` as plain PyTorch."""
    sequences = log_probs.new_zeros(len(inputs.ref_log_probs))
    sequences = sequences.index_add(0, inputs.sequence_of, log_probs)
    return -(2 / BETA) * F.logsigmoid(-BETA * (sequences - inputs.ref_log_probs)).mean()


HEADS: dict[str, Callable[[Tensor, Inputs], Tensor]] = {
    "NPO": npo,
    "NLL": lambda log_probs, inputs: -log_probs.mean(),
}


@dataclass(frozen=True)
class Errors:
    """Relative errors of one result (the loss: relative to at least 1e-2)."""

    loss: float
    hidden_gradient: float
    weight_gradient: float

    def acceptable(self, dtype: str) -> bool:
        """Whether all errors are within the tolerance of the dtype; NaN is not."""
        return all(error <= TOLERANCE[dtype] for error in asdict(self).values())


class Oracle:
    """The fp64 results for one set of inputs."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        rows, vocabulary = inputs.shape.rows, inputs.shape.vocabulary
        device = inputs.hidden.device
        self.rows = _spread(rows, SAMPLE, device)
        self.columns = torch.cat([inputs.labels[self.rows], _spread(vocabulary, SAMPLE, device)])
        self.hidden = hidden = inputs.hidden.detach().double()
        weight = inputs.weight.detach()
        slices = weight.split(max(1, SLICE_BYTES // (8 * rows)))
        lse = hidden.new_full((rows,), -torch.inf)
        for weight_slice in map(Tensor.double, slices):
            lse = torch.logaddexp(lse, (hidden @ weight_slice.T).logsumexp(-1))
        targets = weight[inputs.labels].double()
        self.log_probs = (hidden * targets).sum(-1) - lse
        # gradients of the log-probs of the sampled rows, and softmax in the sampled columns
        self.row_gradients = targets[self.rows]
        for weight_slice in map(Tensor.double, slices):
            p = (hidden[self.rows] @ weight_slice.T - lse[self.rows, None]).exp()
            self.row_gradients -= p @ weight_slice
        p = (hidden @ weight[self.columns].double().T - lse[:, None]).exp()
        at_label = inputs.labels[:, None] == self.columns
        self.column_gradients = at_label.double() - p  # (N, columns)

    def errors(self, head: str, loss: Tensor, d_hidden: Tensor, d_weight: Tensor) -> Errors:
        """Relative errors of one result."""
        log_probs = self.log_probs.clone().requires_grad_()
        expected = HEADS[head](log_probs, self.inputs)
        (g,) = torch.autograd.grad(expected, log_probs)
        value = expected.item()
        return Errors(
            abs(loss.item() - value) / max(abs(value), 1e-2),
            _relative(d_hidden[self.rows], g[self.rows, None] * self.row_gradients),
            _relative(d_weight[self.columns], self.column_gradients.T @ (g[:, None] * self.hidden)),
        )


def _relative(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


def _spread(count: int, samples: int, device: torch.device) -> Tensor:
    return torch.linspace(0, count - 1, min(count, samples), device=device).round().long()
