"""Records of files, folders, the hub or rows, tokenised once and packed without padding."""

from npo_fast.data.answers import alternated, load_refusals, refused
from npo_fast.data.files import split_suffix
from npo_fast.data.forms import LossOn
from npo_fast.data.packing import PackedBatch, concatenate, micro_batches, pack
from npo_fast.data.padding import PaddedCollator
from npo_fast.data.readers import as_rows, describe, load_records, load_rows
from npo_fast.data.records import Record, Records
from npo_fast.data.rendering import Rendering
from npo_fast.data.repeats import check_apart, repeats
from npo_fast.data.template import Template, text_fingerprint
from npo_fast.data.tokenized import (
    Sources,
    TokenizedExample,
    check_readable,
    data_fingerprint,
)

__all__ = [
    "LossOn", "PackedBatch", "PaddedCollator", "Record", "Records", "Rendering", "Sources",
    "Template", "TokenizedExample", "alternated", "as_rows", "check_apart", "check_readable",
    "concatenate", "data_fingerprint", "describe", "load_records", "load_refusals", "load_rows",
    "micro_batches", "pack", "refused", "repeats", "split_suffix", "text_fingerprint",
]  # fmt: skip
