"""From losses to new weights: all gradients first, or each one applied where it arises."""

import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn import Parameter

from npo_fast.distributed import local_of
from npo_fast.trainer.optimizers import (
    clip_gradients,
    clipping,
    keep_states_on_cpu,
    norm_of,
    norm_over_ranks,
    parameters_of,
    step_one_at_a_time,
)


class Update:
    """One step of the optimizer, from the losses of its micro-batches.

    Gradients add up in ``.grad``, and the optimizer sees them together.
    """

    takes_whole_step = False
    """Whether all micro-batches of a step must go through the model before ``apply``."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, max_norm: float, offload: bool = False
    ) -> None:
        self.optimizer, self.max_norm, self.offload = optimizer, max_norm, offload
        self.partially_applied = 0  # tensors changed before a gradient of the step was not finite
        self.started = False  # whether ``apply`` has begun to change weights or optimizer states
        if offload:
            keep_states_on_cpu(optimizer)

    def add(self, loss: Tensor) -> None:
        """Takes the loss of a micro-batch; the step's is their sum."""
        loss.backward()

    def discard(self) -> None:
        """Forgets the losses and gradients of the step."""
        self.optimizer.zero_grad(set_to_none=True)

    def apply(self, loss: float) -> float:
        """Changes the weights if the step's ``loss`` and the gradient norm are finite.

        Returns the global norm of the gradient before clipping. No gradient is left afterwards.
        """
        self.started = False
        norm = clip_gradients(parameters_of(self.optimizer), self.max_norm)
        if math.isfinite(loss) and math.isfinite(norm):
            self.started = True
            if self.offload:
                step_one_at_a_time(self.optimizer)
            else:
                self.optimizer.step()
        self.discard()
        return norm


class StepInBackward(Update):
    """Each tensor is stepped, and its gradient freed, as soon as the backward completes it.

    The global norm must be known before the first tensor changes. With a finite ``max_norm`` the
    backward therefore runs twice: first to measure the norm, then to step with scaled gradients.
    The result is that of ``Update``, and a step that is not finite changes nothing. With an
    infinite ``max_norm`` nothing is clipped and one backward does. Each gradient is checked before
    it is applied, but tensors nearer to the loss have changed by then (``partially_applied``).
    """

    takes_whole_step = True
    _loss: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        self._loss = loss if self._loss is None else self._loss + loss

    def discard(self) -> None:
        self._loss = None  # and the activations that it holds

    def apply(self, loss: float) -> float:
        total, self._loss = self._loss, None
        assert total is not None
        self.started = False
        if not math.isfinite(loss):
            return math.nan
        if math.isinf(self.max_norm):
            return self._backward_unclipped(total)
        norm = self._backward(total, lambda parameter, norm: None, retain_graph=True)
        if math.isfinite(norm):
            scale = clipping(self.max_norm, norm)
            self._backward(total, lambda parameter, norm: self._step(parameter, scale))
        return norm

    def _backward_unclipped(self, loss: Tensor) -> float:
        changed, finite = 0, True

        def step_while_finite(parameter: Parameter, norm: Tensor) -> None:
            nonlocal changed, finite
            finite = finite and math.isfinite(float(norm))  # of this process's share
            if finite:
                self._step(parameter)
                changed += 1

        norm = self._backward(loss, step_while_finite)
        self.partially_applied = 0 if math.isfinite(norm) else max(1, changed)
        return norm

    def _backward(
        self, loss: Tensor, use: Callable[[Parameter, Tensor], None], retain_graph: bool = False
    ) -> float:
        """Hands each gradient with its norm to ``use`` and frees it; returns the global norm."""
        norms: list[Tensor] = []

        def completed(parameter: Tensor) -> None:
            assert isinstance(parameter, Parameter)
            assert parameter.grad is not None
            norms.append(norm_of(parameter.grad))
            use(parameter, norms[-1])
            parameter.grad = None

        with ExitStack() as hooks:
            for parameter in parameters_of(self.optimizer):
                hooks.enter_context(parameter.register_post_accumulate_grad_hook(completed))
            loss.backward(retain_graph=retain_graph)
        return norm_over_ranks(norms, parameters_of(self.optimizer)[0])

    def _step(self, parameter: Parameter, scale: float = 1.0) -> None:
        """The others have no gradient now, so the optimizer steps this one alone."""
        assert parameter.grad is not None
        self.started = True
        if scale < 1:
            local_of(parameter.grad).mul_(scale)
        self.optimizer.step()
