"""Does it fit, and if not, what is the cheapest thing to change."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

from npo_fast.methods import build_method
from npo_fast.planner.plan import Footprint, Planned
from npo_fast.trainer.order import batch_keys

CARDS_GB = (12, 16, 24, 40, 48, 80)


@dataclass(frozen=True)
class Switch:
    """A change of the plan, and what it costs the user."""

    cost: str
    change: Callable[[Planned], Planned]
    on_ranks: bool = True  # whether several processes can do it


# in the order of what they cost
SWITCHES = (
    Switch("a third more time", lambda p: replace(p, gradient_checkpointing=True)),
    Switch("coarser optimizer states", lambda p: replace(p, optimizer="adamw-8bit"),
           on_ranks=False),
    Switch("a step is one pass, clipped by a second backward",
           lambda p: _within(replace(p, step_in_backward=True), p.micro_batch_tokens),
           on_ranks=False),
    Switch("shorter passes", lambda p: _within(p, min(512, p.micro_batch_tokens))),
    Switch("adapters alone are trained", lambda p: _adapters(p)),
    Switch("adapters alone are trained, on rounded weights",
           lambda p: replace(_adapters(p), quantize="4bit"), on_ranks=False),
)  # fmt: skip


def _within(planned: Planned, tokens: int) -> Planned:
    """So many tokens a pass, but no less than a step in the backward takes at least."""
    least = _step_tokens(planned) if planned.step_in_backward else 1
    return replace(planned, micro_batch_tokens=max(least, tokens))


def _step_tokens(planned: Planned) -> int:
    """Of a step with one sequence of each set."""
    sets = sum(len(batch_key) for batch_key in batch_keys(build_method(planned.method)))
    return sets * planned.sequence_length


def _adapters(planned: Planned) -> Planned:
    """They are fp32, which adamw-bf16 does not train."""
    optimizer = "adamw" if planned.optimizer == "adamw-bf16" else planned.optimizer
    return replace(planned, lora_rank=planned.lora_rank or 16, optimizer=optimizer)


@dataclass(frozen=True)
class Advice:
    """The cheapest change of a plan that makes it fit a card, or where nothing does, the most."""

    card_gb: float
    fits: bool
    planned: Planned
    switches: tuple[Switch, ...]
    footprint: Footprint


def flags(before: Planned, after: Planned) -> list[str]:
    """What to add to the command line of ``before`` to get ``after``."""
    changed = {k: v for k, v in vars(after).items() if v != getattr(before, k)}
    if "step_in_backward" in changed or (
        after.step_in_backward and "micro_batch_tokens" in changed
    ):
        changed["batch_size"] = whole_batch(after)
    return [f"--{k.replace('_', '-')}{'' if v is True else f' {v}'}" for k, v in changed.items()]


def whole_batch(planned: Planned) -> int:
    """Sequences of each set that are one pass, which with ``step_in_backward`` is a whole step."""
    return max(1, planned.micro_batch_tokens // _step_tokens(planned))


def card_bytes(card_gb: float) -> int:
    """A card's GB are taken as 10^9 bytes: of 24 GB some have 22.5 GiB to give, some 23.6."""
    return int(card_gb * 1e9)


def advise(
    planned: Planned, card_gb: float, measure: Callable[[Planned], Footprint], ranks: int = 1
) -> Advice:
    """The cheapest switches with which ``planned`` fits.

    They are added in order until it fits; then those that it fits without are taken back, the
    dearest first. ``measure`` meets plans more than once, so let it remember.
    """
    room = card_bytes(card_gb)

    def attempt(switches: tuple[Switch, ...]) -> Advice:
        plan = reduce(lambda plan, switch: switch.change(plan), switches, planned)
        found = measure(plan)
        return Advice(card_gb, found.needed <= room, plan, switches, found)

    able = (s for s in SWITCHES if s.on_ranks or ranks == 1)
    useful = tuple(s for s in able if s.change(planned) != planned)
    attempts = (attempt(useful[:count]) for count in range(len(useful) + 1))
    best = next((one for one in attempts if one.fits), None)
    if best is None:
        return attempt(useful)
    for switch in reversed(best.switches[:-1]):
        fewer = attempt(tuple(s for s in best.switches if s is not switch))
        if fewer.fits:
            best = fewer
    return best
