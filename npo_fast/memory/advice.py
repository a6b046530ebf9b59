"""Does it fit, and if not, what is the cheapest thing to change."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

from npo_fast.memory.plan import Footprint, Planned

CARDS_GB = (12, 16, 24, 40, 48, 80)


@dataclass(frozen=True)
class Switch:
    """A change of the plan, and what it costs the user."""

    cost: str
    change: Callable[[Planned], Planned]


# in the order of what they cost
SWITCHES = (
    Switch("a third more time", lambda p: replace(p, gradient_checkpointing=True)),
    Switch("coarser optimizer states", lambda p: replace(p, optimizer="adamw-8bit")),
    Switch("a step is one pass, clipped by a second backward",
           lambda p: replace(p, step_in_backward=True)),
    Switch("shorter passes",
           lambda p: replace(p, micro_batch_tokens=min(512, p.micro_batch_tokens))),
    Switch("adapters alone are trained", lambda p: replace(p, lora_rank=p.lora_rank or 16)),
    Switch("adapters alone are trained, on rounded weights",
           lambda p: replace(p, lora_rank=p.lora_rank or 16, quantize="4bit")),
)  # fmt: skip


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
    changed = ((k, v) for k, v in vars(after).items() if v != getattr(before, k))
    return [f"--{k.replace('_', '-')}{'' if v is True else f' {v}'}" for k, v in changed]


def card_bytes(card_gb: float) -> int:
    """A card's GB are taken as 10^9 bytes: of 24 GB some have 22.5 GiB to give, some 23.6."""
    return int(card_gb * 1e9)


def advise(planned: Planned, card_gb: float, measure: Callable[[Planned], Footprint]) -> Advice:
    """The cheapest switches with which ``planned`` fits.

    They are added in order until it fits; then those that it fits without are taken back, the
    dearest first. ``measure`` meets plans more than once, so let it remember.
    """
    room = card_bytes(card_gb)

    def attempt(switches: tuple[Switch, ...]) -> Advice:
        plan = reduce(lambda plan, switch: switch.change(plan), switches, planned)
        found = measure(plan)
        return Advice(card_gb, found.needed <= room, plan, switches, found)

    useful = tuple(s for s in SWITCHES if s.change(planned) != planned)
    attempts = (attempt(useful[:count]) for count in range(len(useful) + 1))
    best = next((one for one in attempts if one.fits), None)
    if best is None:
        return attempt(useful)
    for switch in reversed(best.switches[:-1]):
        fewer = attempt(tuple(s for s in best.switches if s is not switch))
        if fewer.fits:
            best = fewer
    return best
