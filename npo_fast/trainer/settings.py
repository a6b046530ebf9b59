"""Settings of the training loop, and the record of a step."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from npo_fast.methods import Schedule
from npo_fast.trainer.optimizers import LearningRateSchedule, Optimizer
from npo_fast.validation import (
    NON_NEGATIVE,
    Bound,
    Checked,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)

LastBatch = Literal["keep", "drop", "carry"]


@dataclass(frozen=True)
class TrainSettings(Checked):
    """Training; the defaults are those of the NPO paper and of open-unlearning on TOFU."""

    epochs: PositiveInt = 10
    """Passes over the data to forget, or to learn."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate of AdamW."""
    lr_schedule: LearningRateSchedule = "linear"
    """Learning rate after the peak: falls to 0 in a line or a cosine, or stays constant, as in
    transformers. Before the peak it rises linearly from 0, which is the rate of the first step."""
    warmup_steps: Annotated[int | None, NON_NEGATIVE] = None
    """Steps until the peak learning rate. Without it: the whole batches of one epoch."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of AdamW; norms and biases have none, as in transformers.Trainer."""
    batch_size: PositiveInt = 32
    """Sequences of each set in a step."""
    last_batch: LastBatch = "keep"
    """What happens to the last, incomplete batch of an epoch. "keep": a smaller batch, as in
    transformers.Trainer. "drop": left out. "carry": filled up from the next epoch, as in the NPO
    paper's code (epochs * questions // batch size steps)."""
    max_grad_norm: Annotated[float, Bound("positive or inf", lambda norm: norm > 0)] = 1.0
    """Scale larger gradients down to this norm; inf clips nothing."""
    micro_batch_tokens: PositiveInt = 2048
    """Tokens that go through the model at a time. Fewer need less memory; results differ only by
    rounding. Halved by itself where memory runs out. In bf16, gradients of micro-batches add up
    with a relative error of about 0.2 % for one, 0.3 % for 4, 0.5 % for 16 and 0.9 % for 64."""
    schedule: Schedule = "summed"
    """"summed": each step has the forget and the retain loss. "alternating": a step on the forget
    data, then one on the retain data."""
    optimizer: Optimizer = "adamw"
    """adamw-8bit and adamw-bf16 (torchao) need less memory. They round bf16 weights at random, so
    that small steps add up; adamw rounds to the nearest."""
    step_in_backward: bool = False
    """Apply each gradient as soon as it is computed, then free it: saves memory. A step is then one
    micro-batch, and clipping takes a second backward (none with --max-grad-norm inf)."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in CPU memory (with a GPU)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward instead of keeping them: slower, less memory."""
    keep_utility: Annotated[float | None, Bound("between 0 and 1", lambda s: 0 < s < 1)] = None
    """Share of the retain answers' probability (per token, geometric mean) to keep, such as 0.9.
    The retain coefficient follows by itself, from the given one on (docs/steps.md)."""
    sharpness_rho: NonNegativeFloat = 0.0
    """Sharpness-aware steps, against relearning and rounding: how far the weights move up the
    forget loss before its gradient is taken (docs/steps.md). 0 takes ordinary steps."""
    seed: int = 0
    """Seed of the data order, of refusals, and of dropout."""


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did. Losses are means over the whole batch of the step."""

    step: int
    steps: int
    epoch: float
    loss: float
    terms: dict[str, float]  # name of each term of the step -> its value, before its coefficient
    log_probs: dict[str, float]  # source -> mean log-prob of a sequence
    grad_norm: float
    lr: float
    tokens: int
    micro_batch_tokens: int  # those of the settings, or fewer since memory ran out
    time_ms: float
    retain_coefficient: float | None = None  # of this step, with --keep-utility
    kept_utility: float | None = None  # share that is left, smoothed, with --keep-utility

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, without those that are None."""
        return {name: value for name, value in vars(self).items() if value is not None}
