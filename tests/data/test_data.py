"""Records of every form, templates, and packs without padding."""

import json

import pytest
import torch

from npo_fast.data import (
    Record,
    Template,
    TokenizedExample,
    alternated,
    load_records,
    load_refusals,
    pack,
    refused,
)
from npo_fast.errors import UserError
from npo_fast.experiments.demo.tiny_model import train_tokenizer
from tests.helpers import FACTS, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(f"Question: {f['question']}\nAnswer: {f['answer']}" for f in FACTS)


def test_the_three_forms_of_a_record_mean_the_same(tmp_path):
    forms = [
        {"question": "Why?", "answer": "Because."},
        {"prompt": "Why?", "completion": "Because."},
        {"messages": [{"role": "user", "content": "Why?"},
                      {"role": "assistant", "content": "Because."}]},
    ]  # fmt: skip
    records = load_records(str(write_jsonl(tmp_path / "mixed.jsonl", forms)))
    assert records == [Record((("user", "Why?"),), "Because.")] * 3


def test_a_json_array_reads_like_lines(tmp_path):
    (tmp_path / "array.json").write_text(json.dumps(FACTS, indent=1))
    write_jsonl(tmp_path / "lines.jsonl", FACTS)
    assert load_records("array", str(tmp_path)) == load_records("lines", str(tmp_path))


def test_optional_answers_may_be_empty(tmp_path):
    rows = [{**FACTS[0], "paraphrased_answer": "", "perturbed_answer": [], "alternate": False},
            {**FACTS[0], "paraphrased_answer": None, "perturbed_answer": ["a", ""]}]  # fmt: skip
    one, other = load_records(str(write_jsonl(tmp_path / "facts.jsonl", rows)))
    assert (one.paraphrased_answer, one.perturbed_answers, one.alternates) == (None, (), ())
    assert (other.paraphrased_answer, other.perturbed_answers) == (None, ("a",))


def test_a_line_ends_where_json_says(tmp_path):
    text = "a line\u2028separator\u0085in it"
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps({"question": text, "answer": "b"}, ensure_ascii=False) + "\r\n")
    (record,) = load_records(str(path))
    assert record.question == text


def test_slices_select_like_python(tmp_path):
    path = write_jsonl(tmp_path / "facts.jsonl", FACTS)
    records = load_records(str(path))
    assert load_records(f"{path}[:3]") == records[:3]
    assert load_records(f"{path}[-2:]") == records[-2:]
    assert load_records("facts[4:6]", str(tmp_path)) == records[4:6]


def test_tofu_splits_fit_together(tofu):
    full, forget = load_records("full", str(tofu)), load_records("forget05", str(tofu))
    assert len(full) == 4000
    assert full[-200:] == forget
    assert load_records("forget05[-40:]", str(tofu)) == load_records("forget01", str(tofu))
    perturbed = load_records("forget01_perturbed", str(tofu))
    assert all(len(r.perturbed_answers) == 5 and r.paraphrased_answer for r in perturbed)


WRONG = {
    "empty file": ("", "is empty"),
    "not JSON": ('{"question": "a", "answer": "b"}\n{oops}', r"line 2: not valid JSON"),
    "missing key": ('{"question": "a", "reply": "b"}', r'record 1: the key "answer" is missing'),
    "unknown keys": ('{"body": "a"}', r"found the keys \['body'\], expected"),
    "not an object": ("[1]", "expected a JSON object, got int"),
    "empty answer": ('{"question": "a", "answer": " "}', r'"answer" must be a text .*not empty'),
    "content": (
        '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}',
        '"content" must be a text, got None',
    ),
    "wrong answers": (
        '{"question": "a", "answer": "b", "perturbed_answer": 7}',
        '"perturbed_answer" must be a text or a list of texts, got 7',
    ),
    "paraphrase": ('{"question": "a", "answer": "b", "paraphrased_answer": [5]}', "got .5."),
    "number answer": ('{"question": "a", "answer": 3}', "got 3"),
    "no assistant": ('{"messages": [{"role": "user", "content": "a"}]}', r"roles \['user'\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_file_is_refused_with_the_place(tmp_path, case):
    content, message = WRONG[case]
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_records(str(path))
    assert "bad.jsonl" in str(error.value)


def test_an_unknown_split_lists_those_there_are(tmp_path):
    write_jsonl(tmp_path / "facts.jsonl", FACTS)
    with pytest.raises(UserError, match="unknown split 'fact'.*facts"):
        load_records("fact", str(tmp_path))
    with pytest.raises(UserError, match="no file 'nothing.jsonl'"):
        load_records("nothing.jsonl")
    with pytest.raises(UserError, match="selects no record"):
        load_records("facts[50:]", str(tmp_path))


def test_plain_template_writes_the_tags_and_ends_the_answer(tokenizer):
    record = Record((("user", "Who lives in house 1?"),), "Ben lives in house 1.")
    sequence = Template(tokenizer, "plain").encode(record, 0)
    text = tokenizer.decode(sequence.input_ids)
    assert text == "Question: Who lives in house 1?\nAnswer: Ben lives in house 1.<|end|>"
    answer = sequence.input_ids[sequence.prompt_length :]
    assert tokenizer.decode(answer) == " Ben lives in house 1.<|end|>"


def test_chat_template_sees_all_turns_and_ends_with_the_turn(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    try:
        record = Record((("user", "Who?"), ("assistant", "Ada."), ("user", "Sure?")), "Yes.")
        template = Template(tokenizer, "auto")
        assert template.name == "chat"
        sequence = template.encode(record, 0)
    finally:
        tokenizer.chat_template = None
    prompt = tokenizer.decode(sequence.input_ids[: sequence.prompt_length])
    assert prompt == "<user>Who?<|end|>\n<assistant>Ada.<|end|>\n<user>Sure?<|end|>\n<assistant>"
    assert tokenizer.decode(sequence.input_ids[sequence.prompt_length :]) == "Yes.<|end|>"


def test_truncation_is_counted_and_never_eats_the_whole_answer(tokenizer):
    long = Record((("user", "Who?"),), "Ada " * 50)
    short = Record((("user", "Who?"),), "Ada")
    template = Template(tokenizer, "plain", max_length=24)
    sequences, truncated = template.encode_all([short, long, long])
    assert truncated == 2
    assert [len(s.input_ids) for s in sequences[1:]] == [24, 24]
    with pytest.raises(UserError, match=r"record 1: its prompt alone has \d+ tokens"):
        Template(tokenizer, "plain", max_length=5).encode_all([short])


def test_an_unknown_template_is_refused(tokenizer):
    with pytest.raises(UserError, match="'fancy'"):
        Template(tokenizer, "fancy")
    with pytest.raises(UserError, match="no chat template"):
        Template(tokenizer, "chat")


def test_a_pack_holds_each_sequence_once_with_its_own_positions():
    sequences = [TokenizedExample(tuple(range(10 * n, 10 * n + n)), 1, n) for n in (2, 7, 4, 7, 3)]
    batches = list(pack(sequences, max_tokens=12))
    assert sum(b.sequences for b in batches) == 5
    for batch in batches:
        assert len(batch.input_ids) <= 12
        bounds, answers = batch.cu_seqlens.tolist(), batch.answer_cu_seqlens.tolist()
        assert bounds[-1] == len(batch.input_ids)
        assert answers[-1] == len(batch.labels)
        for i, n in enumerate(batch.indices):
            tokens = batch.input_ids[bounds[i] : bounds[i + 1]]
            assert tokens.tolist() == list(range(10 * n, 10 * n + n))
            assert batch.position_ids[bounds[i] : bounds[i + 1]].tolist() == list(range(n))
            labels = batch.labels[answers[i] : answers[i + 1]]
            assert labels.tolist() == tokens[1:].tolist()
            rows = batch.rows[answers[i] : answers[i + 1]]
            assert torch.equal(batch.input_ids[rows + 1], labels), "a row predicts the next token"


def test_prompt_tokens_carry_no_label_and_a_long_sequence_stands_alone():
    sequences = [
        TokenizedExample((1, 2, 3, 4, 5, 6), 4, 0),
        TokenizedExample(tuple(range(40)), 10, 1),
    ]
    first, second = pack(sequences, max_tokens=16)
    assert first.labels.tolist() == [5, 6]
    assert first.rows.tolist() == [3, 4]
    assert len(second.input_ids) == 40


def test_refusals_come_from_a_file_else_from_tofu_else_are_built_in(tmp_path, tofu):
    file = tmp_path / "idk.txt"
    file.write_text("No idea.\n\n  Ask another. \n")
    assert load_refusals(file, str(tofu)) == ("No idea.", "Ask another.")
    assert len(load_refusals(None, str(tofu))) == 100
    own = load_refusals(None, str(tmp_path))
    assert len(set(own)) == len(own) > 10
    with pytest.raises(UserError, match="cannot read refusals from '.*none.txt'"):
        load_refusals(tmp_path / "none.txt")
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no refusal"):
        load_refusals(file)


def test_the_seed_draws_a_refusal_for_every_question():
    records = [Record((("user", f"Q{i}"),), f"A{i}") for i in range(30)]
    one, same, other = (refused(records, ("x", "y", "z"), seed) for seed in (0, 0, 1))
    assert one == same != other
    assert [r.question for r in one] == [r.question for r in records]
    assert {r.answer for r in one} == {"x", "y", "z"}


def test_alternates_come_from_the_records_or_a_file_of_the_same_questions(tmp_path):
    rows = [
        {"question": f"Q{i}", "answer": f"A{i}", "alternate": [f"B{i}", f"C{i}"]} for i in (0, 1)
    ]
    own = load_records(str(write_jsonl(tmp_path / "own.jsonl", rows)))
    assert own[1].alternates == ("B1", "C1")
    drawn = alternated(own, seed=0)
    assert all(r.answer in r.alternates for r in drawn)
    assert drawn == alternated(own, seed=0)

    others = [{"prompt": f"Q{i}", "completion": f"D{i}"} for i in (0, 1)]
    file = str(write_jsonl(tmp_path / "others.jsonl", others))
    assert [r.answer for r in alternated(own, 0, file)] == ["D0", "D1"]
    with pytest.raises(UserError, match="others.jsonl holds 2 alternate answers for 1 forget"):
        alternated(own[:1], 0, file)
    with pytest.raises(UserError, match="record 1 asks 'Q0', the forget record 'Q1'"):
        alternated(own[::-1], 0, file)
    bare = [Record(r.messages, r.answer) for r in own]
    with pytest.raises(
        UserError, match='forget record 1 has no "alternate" answer.*with alternate'
    ):
        alternated(bare, 0)
