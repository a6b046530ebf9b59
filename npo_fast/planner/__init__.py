"""What a run will cost: its real training step on tensors without data, every storage counted."""

from npo_fast.planner.advice import CARDS_GB, Advice, advise, flags
from npo_fast.planner.plan import Footprint, Planned, footprint

__all__ = ["CARDS_GB", "Advice", "Footprint", "Planned", "advise", "flags", "footprint"]
