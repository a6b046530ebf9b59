"""Predicts the memory of a run: its training step on tensors without data, storages counted."""

from npo_fast.planner.advice import CARDS_GB, Advice, advise, flags
from npo_fast.planner.memory import Footprint, PlannedRun, footprint

__all__ = ["CARDS_GB", "Advice", "Footprint", "PlannedRun", "advise", "flags", "footprint"]
