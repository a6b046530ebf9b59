"""Records from TOFU, JSONL files or the hub, tokenised once and packed without padding."""

from npo_fast.data.answers import alternated, load_refusals, refused
from npo_fast.data.packing import PackedBatch, concatenate, micro_batches, pack
from npo_fast.data.padding import PaddedCollator
from npo_fast.data.records import Record, Records, as_rows, describe, load_records
from npo_fast.data.template import (
    Sources,
    Template,
    TokenizedExample,
    check_vocabulary,
    data_fingerprint,
)

__all__ = [
    "PackedBatch", "PaddedCollator", "Record", "Records", "Sources", "Template",
    "TokenizedExample", "alternated", "as_rows", "check_vocabulary", "concatenate",
    "data_fingerprint", "describe", "load_records", "load_refusals", "micro_batches", "pack",
    "refused",
]  # fmt: skip
