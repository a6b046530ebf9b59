"""Padded batches are the tokenised examples, and nothing but padding beside them."""

import pytest
import torch
from torch.utils.data import DataLoader

from npo_fast.data import PaddedCollator, Template, TokenizedExample, load_records
from npo_fast.errors import UserError
from npo_fast.experiments.demo.tiny_model import train_tokenizer
from tests.helpers import FACTS, sequences


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(f"Question: {f['question']}\nAnswer: {f['answer']}" for f in FACTS)


ROWS = [*FACTS[:3], {"question": "Why?", "answer": "Because."}]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_a_batch_is_its_examples_with_padding_beside_them(tokenizer, side, multiple):
    template = Template(tokenizer)
    examples, _ = template.encode_all(load_records(ROWS))
    collate = PaddedCollator(template, padding_side=side, pad_to_multiple_of=multiple)
    batch = collate(examples)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    length = batch["input_ids"].shape[1]
    longest = max(len(example.input_ids) for example in examples)
    assert length == -(-longest // multiple) * multiple
    for i, example in enumerate(examples):
        real = batch["attention_mask"][i].bool()
        assert tuple(batch["input_ids"][i, real].tolist()) == example.input_ids
        gap = length - len(example.input_ids)
        assert real.int().tolist() == (
            [0] * gap + [1] * len(example.input_ids)
            if side == "left"
            else [1] * len(example.input_ids) + [0] * gap
        )
        labels = batch["labels"][i, real].tolist()
        assert labels[: example.prompt_length] == [-100] * example.prompt_length
        assert tuple(labels[example.prompt_length :]) == example.input_ids[example.prompt_length :]
        assert (batch["labels"][i, ~real] == -100).all()


def test_records_their_dicts_and_tokenised_examples_make_the_same_batch(tokenizer):
    records = load_records(ROWS)
    examples, _ = Template(tokenizer).encode_all(records)
    expected = PaddedCollator(Template(tokenizer))(examples)
    for items in (records, ROWS):
        batch = PaddedCollator(tokenizer)(items)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    loader = DataLoader(ROWS, batch_size=4, collate_fn=PaddedCollator(tokenizer))
    (batch,) = loader
    assert torch.equal(batch["labels"], expected["labels"])


def test_items_of_several_sets_make_a_batch_of_each(tokenizer):
    collate = PaddedCollator(tokenizer, with_index=True)
    items = [
        {"forget": forget, "retain": retain}
        for forget, retain in zip(sequences(4, 1), sequences(4, 2)[::-1], strict=True)
    ]
    batch = collate(items)
    assert batch["forget"]["index"].tolist() == [0, 1, 2, 3]
    assert batch["retain"]["index"].tolist() == [3, 2, 1, 0]
    nested = PaddedCollator(tokenizer)([{"forget": row} for row in ROWS])
    assert nested["forget"]["input_ids"].shape[0] == 4


def test_another_ignore_index_and_no_pad_token_are_served(tokenizer):
    class Bare:
        """A tokenizer without a pad token."""

        pad_token_id, chat_template, eos_token_id = None, None, 7

    collate = PaddedCollator(Bare(), ignore_index=-1)
    batch = collate([TokenizedExample((3, 4, 5), 1, 0), TokenizedExample((3, 4), 1, 1)])
    assert batch["input_ids"].tolist() == [[3, 4, 5], [3, 4, 7]]
    assert batch["labels"].tolist() == [[-1, 4, 5], [-1, 4, -1]]


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([], {}, "the batch holds no item"),
        (["Why?"], {}, "item 1 of the batch: expected a JSON object, got str"),
        ([FACTS[0], {"a": "b"}], {}, "item 2 of the batch: .*found the keys"),
        ([FACTS[0]], {"with_index": True}, "with_index needs items that know their row"),
        ([FACTS[0]], {"padding_side": "both"}, "padding_side must be right or left, got 'both'"),
        ([FACTS[0]], {"pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1, got 0"),
    ],
)
def test_what_makes_no_batch_is_refused(tokenizer, items, options, message):
    with pytest.raises(UserError, match=message):
        PaddedCollator(tokenizer, **options)(items)


def test_a_record_that_does_not_fit_is_named_by_its_place(tokenizer):
    collate = PaddedCollator(Template(tokenizer, max_length=12))
    with pytest.raises(UserError, match="item 2 of the batch: .*its prompt alone has"):
        collate([{"question": "a", "answer": "b"}, {"question": "Why? " * 20, "answer": "b"}])
