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
    """How to train; the defaults are those of the NPO paper, and of open-unlearning, on TOFU."""

    epochs: PositiveInt = 10
    """Passes over the data to forget (to learn, for finetune)."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate of AdamW."""
    lr_schedule: LearningRateSchedule = "linear"
    """From the peak on, as transformers.get_scheduler has it: falls to 0 linearly or as half a
    cosine, or stays. Before it the rate rises linearly; the first step of a rise has rate 0."""
    warmup_steps: Annotated[int | None, NON_NEGATIVE] = None
    """Steps of the rise; where it is not given, the whole batches of one epoch."""
    weight_decay: NonNegativeFloat = 0.01
    """Of AdamW; norms and biases have none, as in transformers.Trainer."""
    batch_size: PositiveInt = 32
    """Sequences of each set a step."""
    last_batch: LastBatch = "keep"
    """Where an epoch is no multiple of the batch size, the rest of it is: a smaller batch ("keep",
    as transformers.Trainer does now), left out of this epoch ("drop", as PyTorch's drop_last), or
    filled up by the next epoch, and only the rest of the run is dropped ("carry", the NPO paper's
    code: epochs * questions // batch size steps)."""
    max_grad_norm: Annotated[float, Bound("positive or inf", lambda norm: norm > 0)] = 1.0
    """Gradients of a larger norm are scaled down to it; inf clips nothing."""
    micro_batch_tokens: PositiveInt = 2048
    """Tokens that go through the model at a time: memory depends on it, results only by rounding.
    Halved where memory runs out. Gradients of micro-batches add up in the weights' dtype: in bf16
    their relative error is about 0.2 % for one, 0.3 % for 4, 0.5 % for 16 and 0.9 % for 64."""
    schedule: Schedule = "summed"
    """"alternating": a step on the forget data, then one on the retain data, in turns."""
    optimizer: Optimizer = "adamw"
    """adamw-8bit and adamw-bf16 (torchao) have small states and round bf16 weights at random, so
    that small steps add up; adamw rounds them to the nearest."""
    step_in_backward: bool = False
    """Apply each gradient as it arises and free it. A step is one micro-batch then, and clipping
    takes a second backward: --max-grad-norm inf does without."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in CPU memory (with a GPU)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward instead of keeping them."""
    keep_utility: Annotated[float | None, Bound("between 0 and 1", lambda s: 0 < s < 1)] = None
    """Share of the probability of the retain answers (per token, geometric mean) to keep: finds the
    retain coefficient by itself, from the given one on (docs/steps.md)."""
    sharpness_rho: NonNegativeFloat = 0.0
    """Sharpness-aware steps: the forget gradient is that of weights moved by this much up the
    forget loss, against relearning and rounding (docs/steps.md); 0 takes ordinary steps."""
    seed: int = 0
    """Order of the data, draws of refusals, and dropout."""


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
