"""Padded batches, for loops and trainers that take what Hugging Face models take."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from npo_fast.data.forms import parse_row
from npo_fast.data.records import Record
from npo_fast.data.template import Template
from npo_fast.data.tokenized import TokenizedExample
from npo_fast.errors import UserError


class PaddedCollator:
    """Makes a padded batch of records: ``input_ids``, ``attention_mask`` and ``labels``, (B, T).

        DataLoader(records, batch_size=8, collate_fn=PaddedCollator(Template(tokenizer)))

    Labels are the input with ``ignore_index`` at prompts and padding; they are not shifted, as
    Hugging Face models and ``sequence_log_probs`` take them. A raw text is a row a
    window. Items that are dicts of such items, ``{"forget": …, "retain": …}``, give a batch for
    each key.

    Args:
        template: what tokenises records; a tokenizer stands for ``Template(tokenizer)``.
        padding_side: "right" or "left".
        pad_to_multiple_of: T is a multiple of it.
        ignore_index: the label of positions without one.
        with_index: adds ``index`` (B,), the row of each example in its set, to look up what was
            computed for it. Only a ``TokenizedExample`` knows its row.

    Raises:
        UserError: items that are no records, or a tokenizer that lacks what a batch needs.
    """

    def __init__(
        self,
        template: Any,
        *,
        padding_side: Literal["right", "left"] = "right",
        pad_to_multiple_of: int = 1,
        ignore_index: int = -100,
        with_index: bool = False,
    ) -> None:
        if padding_side not in ("right", "left"):
            raise UserError(f"padding_side must be right or left, got {padding_side!r}")
        if pad_to_multiple_of < 1:
            raise UserError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
        self.template = template if isinstance(template, Template) else Template(template)
        self.padding_side, self.pad_to_multiple_of = padding_side, pad_to_multiple_of
        self.ignore_index, self.with_index = ignore_index, with_index
        tokenizer = self.template.tokenizer
        pad = getattr(tokenizer, "pad_token_id", None)
        # masked, so that any token will do
        self.pad_token_id = tokenizer.eos_token_id if pad is None else pad

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """The batch of items: records or their dicts, tokenised examples, or dicts of such."""
        if not items:
            raise UserError("PaddedCollator: the batch holds no item")
        first = items[0]
        if isinstance(first, Mapping) and all(map(_is_item, first.values())):
            return {key: self([item[key] for item in items]) for key in first}
        return self._pad([e for i, item in enumerate(items) for e in self._tokenized(item, i)])

    def _tokenized(self, item: Any, place: int) -> list[TokenizedExample]:
        if isinstance(item, TokenizedExample):
            return [item]
        if self.with_index:
            raise UserError(
                "PaddedCollator: with_index needs items that know their row: tokenise them first, "
                "Template(tokenizer).encode_all(records)"
            )
        where = f"item {place + 1} of the batch"
        (record,) = [item] if isinstance(item, Record) else parse_row(item, where)
        return self.template.encode_all([record], where)[0]

    def _pad(self, examples: list[TokenizedExample]) -> dict[str, Tensor]:
        longest = max(len(example.input_ids) for example in examples)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = len(examples), length
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, self.ignore_index)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            ids = torch.tensor(example.input_ids)
            first = length - len(ids) if self.padding_side == "left" else 0
            end, answer = first + len(ids), first + example.prompt_length
            input_ids[row, first:end] = ids
            attention_mask[row, first:end] = 1
            labels[row, answer:end] = ids[example.prompt_length :]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if self.with_index:
            batch["index"] = torch.tensor([example.index for example in examples])
        return batch


def _is_item(value: Any) -> bool:
    """Whether a value of a dict is an item by itself, and not the text of a record."""
    return isinstance(value, (Record, TokenizedExample, Mapping))
