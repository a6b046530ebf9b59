"""Predicts the memory of a run: its training step on tensors without data, storages counted."""

from npo_fast.planner.advice import CARDS_GB, Advice, advise, flags
from npo_fast.planner.disk import SavedBytes, saved_bytes
from npo_fast.planner.memory import Footprint, PlannedRun, footprint
from npo_fast.planner.model import empty_model

__all__ = [
    "CARDS_GB", "Advice", "Footprint", "PlannedRun", "SavedBytes", "advise", "empty_model", "flags",
    "footprint", "saved_bytes",
]  # fmt: skip
