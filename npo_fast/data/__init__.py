"""Records from TOFU, JSONL files or the hub, tokenised once and packed without padding."""

from npo_fast.data.answers import alternated, load_refusals, refused
from npo_fast.data.packing import PackedBatch, join, micro_batches, pack
from npo_fast.data.records import Record, load_records
from npo_fast.data.template import Sequence, Template, check_vocabulary

__all__ = [
    "PackedBatch",
    "Record",
    "Sequence",
    "Template",
    "alternated",
    "check_vocabulary",
    "join",
    "load_records",
    "load_refusals",
    "micro_batches",
    "pack",
    "refused",
]
