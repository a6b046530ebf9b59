"""``npo-fast plan``: what a run will need, before anyone rents a card."""

import logging
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from npo_fast import tables
from npo_fast.cli.console import show
from npo_fast.cli.settings import Common
from npo_fast.errors import UserError
from npo_fast.trainer.optimizers import Optimizer

if TYPE_CHECKING:
    from npo_fast.planner import Advice, Footprint, PlannedRun

GIB = 1 << 30

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanOptions:
    """The run to plan; the flags are those of unlearn."""

    model: str
    """Hub name, folder, or config.json alone: no weights are needed or loaded."""
    card: float | None = None
    """GB of the card to fit; without it 12, 16, 24, 40, 48 and 80."""
    method: str = "NPO+RT"
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of the weights."""
    micro_batch_tokens: int = 2048
    """Tokens that go through the model at a time."""
    sequence_length: int = 256
    """Tokens of a sequence, prompt and answer."""
    optimizer: Optimizer = "adamw"
    gradient_checkpointing: bool = False
    """Compute activations again in the backward instead of keeping them."""
    step_in_backward: bool = False
    """Apply each gradient as it arises and free it."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in CPU memory."""
    lora_rank: int = 0
    """Train adapters of this rank instead of the weights."""
    quantize: Literal["none", "4bit"] = "none"
    """Weights below the adapters."""
    ranks: int = 1
    """GPUs that share the model (FSDP); the numbers are of one of them."""

    def planned(self) -> "PlannedRun":
        """The options as the planner takes them."""
        from npo_fast.planner import PlannedRun

        return PlannedRun(**{name: getattr(self, name) for name in PlannedRun.__dataclass_fields__})


@dataclass(frozen=True)
class Command:
    """The options of ``npo-fast plan``, by group."""

    plan: PlanOptions


def run(command: Command, common: Common) -> None:
    """Predicts the memory of a run and prints on which card it fits."""
    options = command.plan
    if options.card is not None and not options.card > 0:
        raise UserError(f"card must be its memory in GB, such as 24, got {options.card:g}")
    if options.ranks < 1:
        raise UserError(f"ranks must be 1 or more, got {options.ranks}")
    planned = options.planned()

    from npo_fast.model.load import load_config
    from npo_fast.planner import CARDS_GB, advise, flags, footprint

    config = load_config(options.model)

    @cache
    def measure(plan: "PlannedRun") -> "Footprint":
        logger.info(" ".join(["a step without data", *flags(planned, plan)]))
        return footprint(config, plan, options.ranks)

    measured = measure(planned)
    cards = CARDS_GB if options.card is None else (options.card,)
    advice = [advise(planned, card, measure, options.ranks) for card in sorted(cards, reverse=True)]
    show(
        _metadata(options, config, measured, advice),
        _text(options, config, measured, advice),
        common.json,
    )


def _metadata(
    options: PlanOptions, config: Any, measured: "Footprint", advice: list["Advice"]
) -> dict[str, Any]:
    from npo_fast.planner import flags

    return {
        "settings": vars(replace(options, model=config.model_type)),
        "parameters": measured.parameters,
        "trained": measured.trained,
        "bytes": measured.bytes,
        "peak_bytes": measured.peak,
        "allowance_bytes": measured.allowance,
        "needed_bytes": measured.needed,
        "cards": [
            {
                "card_gb": card.card_gb,
                "fits": card.fits and not card.switches,
                "fits_with": flags(options.planned(), card.planned) if card.fits else None,
                "needed_bytes": card.footprint.needed,
            }
            for card in reversed(advice)
        ],
    }


def _text(options: PlanOptions, config: Any, measured: "Footprint", advice: list["Advice"]) -> str:
    from npo_fast.planner.memory import FRAGMENTATION, KINDS

    planned = options.planned()
    share = "" if options.ranks == 1 else f", one of {options.ranks} GPUs"
    trained = (
        "" if measured.trained == measured.parameters else f", {_count(measured.trained)} trained"
    )
    lines = [
        f"{config.model_type}, {_count(measured.parameters)} parameters{trained}: {options.method} "
        f"with {options.optimizer}, {options.dtype}, {options.micro_batch_tokens} tokens a pass"
        f"{share}",
        "",
        "At its peak a step holds" + " " * 6 + "GiB",
        *(
            _row(title, measured.bytes[kind])
            for kind, title in KINDS.items()
            if measured.bytes[kind]
        ),
        _row("sum", measured.peak),
        _row("CUDA context, gaps", measured.allowance),
        _row("needed", measured.needed),
        "",
        tables.plain(
            (
                [f"{card.card_gb:g} GB", _gib(card.footprint.needed), _verdict(planned, card)]
                for card in reversed(advice)
            ),
            ("card", "GiB", "fits"),
        ),
        *_costs(planned, advice),
        "",
        f"A card of 24 GB counts as {24e9 / GIB:.1f} GiB. Gaps: {FRAGMENTATION:.0%} of what comes "
        "and goes.",
    ]
    if options.ranks > 1:
        lines.append(
            f"Weights, gradients, states and head are divided by {options.ranks}; two gathered "
            "layers, one whole gradient and the answer rows of all GPUs are added."
        )
    if options.offload_optimizer:
        lines.append("Optimizer states lie in CPU memory; the largest tensor's visit the GPU.")
    return "\n".join(lines)


def _row(title: str, size: int) -> str:
    return f"  {title:<22}{_gib(size):>9}"


def _verdict(planned: "PlannedRun", card: "Advice") -> str:
    from npo_fast.planner import flags

    if not card.fits:
        return "no, even with all of these" if card.switches else "no"
    change = " ".join(flags(planned, card.planned))
    return f"with {change}" if change else "yes"


def _costs(planned: "PlannedRun", advice: list["Advice"]) -> list[str]:
    """Each switch that is advised, once."""
    from npo_fast.planner import flags

    advised = dict.fromkeys(switch for card in advice for switch in card.switches)
    rows = [(" ".join(flags(planned, s.change(planned))), s.cost) for s in advised]
    return ["", *(f"  {flag:<34}{cost}" for flag, cost in rows)] if rows else []


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
