"""``npo-fast plan``: what a run will need, before anyone rents a card."""

import logging
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated

import tyro

from npo_fast import tables
from npo_fast.cli.console import Output
from npo_fast.errors import UserError
from npo_fast.model.load import load_config
from npo_fast.planner import (
    CARDS_GB,
    Advice,
    Footprint,
    PlannedRun,
    SavedBytes,
    advise,
    empty_model,
    flags,
    footprint,
    saved_bytes,
)
from npo_fast.planner.memory import FRAGMENTATION, GIB, KINDS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """The model and the GPU."""

    model: str
    """Hub name, folder, or a config.json alone. No weights are needed or loaded."""
    card: Annotated[float | None, tyro.conf.arg(metavar="GB")] = None
    """Memory of the GPU to fit. Without it: 12, 16, 24, 40, 48 and 80 GB."""
    ranks: int = 1
    """GPUs that share the model (FSDP). The numbers are those of one of them."""
    run: PlannedRun = field(default_factory=PlannedRun)


def run(command: Command) -> Output:
    """Predicts the memory of a run, and its disk; returns on which card it fits."""
    card, ranks, planned = command.card, command.ranks, command.run
    if card is not None and not card > 0:
        raise UserError(f"card must be its memory in GB, such as 24, got {card:g}")
    config = load_config(command.model)

    @cache
    def measure(run: PlannedRun) -> Footprint:
        with_these = f" with {' '.join(changed)}" if (changed := flags(planned, run)) else ""
        logger.info(f"counting the memory of a step{with_these}")
        return footprint(config, run, ranks)

    measured = measure(planned)
    cards = CARDS_GB if card is None else (card,)
    advice = [advise(planned, size, measure) for size in reversed(cards)]
    advice.reverse()
    model = empty_model(config, planned.dtype, planned.lora_rank, planned.quantize)
    saved = saved_bytes(model, planned.optimizer)
    result = {
        "settings": {"model": config.model_type, "card": card, "ranks": ranks, **vars(planned)},
        "parameters": measured.parameters,
        "trained": measured.trained,
        "bytes": measured.bytes,
        "peak_bytes": measured.peak,
        "allowance_bytes": measured.allowance,
        "whole_bytes": measured.whole_bytes,
        "needed_bytes": measured.needed,
        "disk_bytes": {"model": saved.model, "checkpoint": saved.checkpoint},
        "cards": [
            {
                "card_gb": each.card_gb,
                "fits": each.fits and not each.switches,
                "fits_with": flags(planned, each.planned) if each.fits else None,
                "needed_bytes": each.footprint.needed,
            }
            for each in advice
        ],
    }
    return Output(result, _text(config.model_type, planned, ranks, measured, advice, saved))


def _text(
    model: str,
    planned: PlannedRun,
    ranks: int,
    measured: Footprint,
    advice: list[Advice],
    saved: SavedBytes,
) -> str:
    share = "" if ranks == 1 else f", one of {ranks} GPUs"
    trained = (
        "" if measured.trained == measured.parameters else f", {_count(measured.trained)} trained"
    )
    lines = [
        f"{model}, {_count(measured.parameters)} parameters{trained}: {planned.method} "
        f"with {planned.optimizer}, {planned.dtype}, {planned.micro_batch_tokens} tokens a pass"
        f"{share}",
        "At its peak a step holds" + " " * 6 + "GiB",
        *(_row(KINDS[kind], size) for kind, size in measured.bytes.items() if size),
        _row("sum", measured.peak),
        _row("CUDA context, gaps", measured.allowance),
        _row("needed", measured.needed),
        *([_row("while 4 bits load", loading)] if (loading := measured.whole_bytes) else []),
        "",
        tables.plain(
            (
                [f"{card.card_gb:g} GB", _gib(card.footprint.needed), _verdict(planned, card)]
                for card in advice
            ),
            ("card", "GiB", "fits"),
        ),
        *_costs(planned, advice),
        "",
        f"A card of 24 GB counts as {24e9 / GIB:.1f} GiB. Gaps: {FRAGMENTATION:.0%} of what comes "
        "and goes.",
        f"On the disk: the model {_gib(saved.model)} GiB; a checkpoint {_gib(saved.checkpoint)} "
        "GiB, two at a time with --save-every.",
    ]
    if ranks > 1:
        lines.append(
            f"Weights, gradients, states and head are divided by {ranks}; gathered layers, a "
            "layer's whole gradient, its sum and the answer rows of all GPUs are added."
        )
    if planned.offload_optimizer:
        lines.append("Optimizer states lie in CPU memory; the largest tensor's visit the GPU.")
    return "\n".join(lines)


def _row(title: str, size: int) -> str:
    return f"  {title:<22}{_gib(size):>9}"


def _verdict(planned: PlannedRun, card: Advice) -> str:
    if not card.fits:
        return "no, even with all of these" if card.switches else "no"
    change = " ".join(flags(planned, card.planned))
    return f"with {change}" if change else "yes"


def _costs(planned: PlannedRun, advice: list[Advice]) -> list[str]:
    """Each switch that is advised, once, the largest card's first."""
    advised = dict.fromkeys(switch for card in reversed(advice) for switch in card.switches)
    rows = [(" ".join(flags(planned, s.change(planned))), s.cost) for s in advised]
    return ["", *(f"  {flag:<34}{cost}" for flag, cost in rows)] if rows else []


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
