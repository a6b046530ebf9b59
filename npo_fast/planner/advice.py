"""Whether a run fits a card, and the cheapest change that makes it fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

from npo_fast.methods import build_method
from npo_fast.planner.memory import Footprint, PlannedRun
from npo_fast.trainer.order import batch_keys

CARDS_GB = (12, 16, 24, 40, 48, 80)


@dataclass(frozen=True)
class Switch:
    """A change of a run's settings that saves memory, and what it costs the user."""

    cost: str
    change: Callable[[PlannedRun], PlannedRun]
    with_copy: bool = True  # whether it works with sharpness-aware steps


# cheapest first
SWITCHES = (
    Switch("a third more time", lambda p: replace(p, gradient_checkpointing=True)),
    Switch("coarser optimizer states", lambda p: replace(p, optimizer="adamw-8bit")),
    Switch("a step is one pass, clipped by a second backward",
           lambda p: _with_tokens(replace(p, step_in_backward=True), p.micro_batch_tokens),
           with_copy=False),
    Switch("shorter passes", lambda p: _with_tokens(p, min(512, p.micro_batch_tokens))),
    Switch("adapters alone are trained", lambda p: _with_adapters(p)),
    Switch("adapters alone are trained, on rounded weights",
           lambda p: replace(_with_adapters(p), quantize="4bit")),
)  # fmt: skip


def _with_tokens(planned: PlannedRun, tokens: int) -> PlannedRun:
    """With so many tokens in a pass, but at least those that ``step_in_backward`` needs."""
    least = _step_tokens(planned) if planned.step_in_backward else 1
    return replace(planned, micro_batch_tokens=max(least, tokens))


def _step_tokens(planned: PlannedRun) -> int:
    """Tokens of a step with one sequence of each set."""
    sets = sum(len(batch_key) for batch_key in batch_keys(build_method(planned.method)))
    return sets * planned.sequence_length


def _with_adapters(planned: PlannedRun) -> PlannedRun:
    """With LoRA adapters; they are fp32, which adamw-bf16 does not train."""
    optimizer = "adamw" if planned.optimizer == "adamw-bf16" else planned.optimizer
    return replace(planned, lora_rank=planned.lora_rank or 16, optimizer=optimizer)


@dataclass(frozen=True)
class Advice:
    """The cheapest switches with which a run fits a card; all of them where it never fits."""

    card_gb: float
    fits: bool
    planned: PlannedRun
    switches: tuple[Switch, ...]
    footprint: Footprint


def flags(before: PlannedRun, after: PlannedRun) -> list[str]:
    """The flags that turn the command line of ``before`` into that of ``after``.

    With ``step_in_backward`` a pass is a whole step: the batch size follows from its tokens.
    """
    changed = {k: v for k, v in vars(after).items() if v != getattr(before, k)}
    if after.step_in_backward and changed.keys() & {"step_in_backward", "micro_batch_tokens"}:
        changed["batch_size"] = max(1, after.micro_batch_tokens // _step_tokens(after))
    return [f"--{k.replace('_', '-')}{'' if v is True else f' {v}'}" for k, v in changed.items()]


def advise(
    planned: PlannedRun, card_gb: float, measure: Callable[[PlannedRun], Footprint]
) -> Advice:
    """The cheapest switches with which ``planned`` fits.

    Switches are added in order until the run fits. Those that are not needed are then removed, the
    most expensive first. ``measure`` is called with the same run more than once: cache it.
    """
    available = int(card_gb * 1e9)  # not 2^30 a GB: some 24 GB cards have only 22.5 GiB

    def attempt(switches: tuple[Switch, ...]) -> Advice:
        changed = reduce(lambda run, switch: switch.change(run), switches, planned)
        footprint = measure(changed)
        return Advice(card_gb, footprint.needed <= available, changed, switches, footprint)

    possible = (s for s in SWITCHES if s.with_copy or not planned.sharpness_rho)
    useful = tuple(s for s in possible if s.change(planned) != planned)
    attempts = (attempt(useful[:count]) for count in range(len(useful) + 1))
    best = next((advice for advice in attempts if advice.fits), None)
    if best is None:
        return attempt(useful)
    for switch in reversed(best.switches[:-1]):
        fewer = attempt(tuple(s for s in best.switches if s is not switch))
        if fewer.fits:
            best = fewer
    return best
