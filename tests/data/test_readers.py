"""Files, folders and rows of every form become the records that they say, or are refused."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from npo_fast.data import Record, alternated, load_records, load_refusals, refused, repeats
from npo_fast.errors import NoSuchSplitError, UserError
from tests.helpers import FACTS, write_jsonl

EXPECTED = [Record((("user", f["question"]),), f["answer"]) for f in FACTS]
ASKED = {"role": "user", "content": "Who?"}
ANSWERED = {"role": "assistant", "content": "Ada."}
LINES = "".join(f"{json.dumps(fact)}\n" for fact in FACTS)


def one(row, **options):
    (record,) = load_records([row], **options)
    return record


# ---- files ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["facts.jsonl", "facts.csv", "facts.txt"])
def test_a_byte_order_mark_says_how_to_read_and_is_no_text(tmp_path, name, encoding):
    rows = [{"question": "Où?", "answer": "Là-bas, à Zürich."}]
    content = {
        "facts.jsonl": json.dumps(rows[0], ensure_ascii=False) + "\n",
        "facts.csv": 'question,answer\nOù?,"Là-bas, à Zürich."\n',
        "facts.txt": "Là-bas, à Zürich.\n",
    }[name]
    (tmp_path / name).write_text(content, encoding=encoding)
    (record,) = load_records(tmp_path / name)
    assert record.answer == "Là-bas, à Zürich."
    assert record.question == ("" if record.is_text else "Où?")


def test_byte_order_marks_of_files_put_together_are_no_text(tmp_path):
    line = json.dumps(FACTS[0]) + "\n"
    (tmp_path / "both.jsonl").write_bytes(line.encode("utf-8-sig") * 2)
    assert load_records(tmp_path / "both.jsonl") == EXPECTED[:1] * 2


def test_refusals_are_read_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "idk.txt"
    for encoding in ("utf-8-sig", "utf-16"):
        file.write_text("No idea.\nAsk another.\n", encoding=encoding)
        assert load_refusals(file) == ("No idea.", "Ask another.")


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_compressed_files_read_like_others(tmp_path, suffix):
    pack = {
        "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
        "zst": lambda content: pa.compress(content, "zstd", asbytes=True),
    }[suffix]  # fmt: skip
    path = tmp_path / f"facts.jsonl.{suffix}"
    path.write_bytes(pack(LINES.encode()))
    assert load_records(path) == EXPECTED
    assert load_records("facts[:2]", str(tmp_path)) == EXPECTED[:2]
    path.write_bytes(pack(LINES.encode())[:-20])
    with pytest.raises(UserError, match=rf"facts.jsonl.{suffix}: .*damaged"):
        load_records(path)


def test_tables_read_like_lines_and_slice(tmp_path):
    table = pd.DataFrame(FACTS)
    table.to_parquet(tmp_path / "facts.parquet")
    table.to_csv(tmp_path / "facts.csv")  # with an index
    table.to_csv(tmp_path / "facts.tsv", sep="\t", index=False)
    table.to_csv(tmp_path / "excel.csv", sep=";", index=False)
    for name in ("facts.parquet", "facts.csv", "facts.tsv", "excel.csv"):
        assert load_records(tmp_path / name) == EXPECTED
        assert load_records(f"{tmp_path / name}[-3:]") == EXPECTED[-3:]


def test_csv_holds_long_texts_line_ends_and_lists(tmp_path):
    long = 'He said "no",\nthen left.\n' * 20_000
    row = {"question": "Why?", "answer": long, "perturbed_answer": json.dumps(["a", "b"])}
    pd.DataFrame([row]).to_csv(tmp_path / "long.csv", index=False)
    (record,) = load_records(tmp_path / "long.csv")
    assert record.answer == long
    assert record.perturbed_answers == ("a", "b")


def test_parquet_holds_conversations_with_empty_fields(tmp_path):
    rows = [{"messages": [{**ASKED, "tool_calls": None}, {**ANSWERED, "tool_calls": None}],
             "tools": "[]", "id": 1}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
    expected = [Record((("user", "Who?"),), "Ada.")]
    assert load_records(tmp_path / "chat.parquet") == expected
    assert load_records(pd.read_parquet(tmp_path / "chat.parquet")) == expected


BROKEN = {
    "latin.txt": ("é".encode("latin-1"), "is not UTF-8 text"),
    "blind.txt": ("ab".encode("utf-16-le"), "NUL characters"),
    "short.csv": (b"question,answer\na\n", "line 2: 1 values for 2 columns"),
    "twice.csv": (b"answer,answer\na,b\n", "line 1: two columns have one name"),
    "quote.csv": (b'question,answer\n"a"b,c\n', "line 2: not valid CSV"),
    "list.csv": (
        b"question,answer,perturbed_answer\na,b,['c']\n",
        "begins like a list and is none",
    ),
    "cut.parquet": (b"PAR1cut", "is not a parquet file, or damaged"),
    "twice.jsonl": (b'{"question": "a", "answer": "b", "answer": "c"}', "line 1: .*a key twice"),
    "late.jsonl": (b'\n{"question": "a", "answer": "b"}\n\n{x}\n', "line 4: not valid JSON"),
    "first.jsonl": (b'{"question": "a"\n{"question": "a", "answer": "b"}\n', "line 1: not valid"),
    "half.jsonl": (rb'{"question": "a", "answer": "\ud83d"}', "half a character"),
    "sheet.xlsx": (b"rows", "is no kind of file that is read: .json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_the_place(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_records(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.slow
def test_plain_files_are_read_without_the_library_that_caches_them(tmp_path):
    pd.DataFrame(FACTS).to_parquet(tmp_path / "facts.parquet")
    write_jsonl(tmp_path / "lines.jsonl", FACTS)
    code = (
        "import sys; from npo_fast.data import load_records\n"
        "for name in ('facts.parquet', 'lines.jsonl'): load_records(name)\n"
        "print('datasets' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr


# ---- folders ----


def test_saved_data_sets_are_read_by_split(tmp_path):
    forget, retain = (datasets.Dataset.from_list(rows) for rows in (FACTS[:4], FACTS[4:]))
    forget.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(forget=forget, retain=retain).save_to_disk(tmp_path / "both")
    assert load_records(tmp_path / "one") == EXPECTED[:4]
    assert load_records("train[:1]", str(tmp_path / "one")) == EXPECTED[:1]
    assert load_records("retain", str(tmp_path / "both")) == EXPECTED[4:]
    with pytest.raises(UserError, match="with forget, retain; name a file, or a split with data"):
        load_records(tmp_path / "both")
    with pytest.raises(NoSuchSplitError, match="is one data set and has no split 'forget'"):
        load_records("forget", str(tmp_path / "one"))


def test_shards_of_a_hub_folder_are_one_split(tmp_path):
    (tmp_path / "data").mkdir()
    for i, rows in enumerate((FACTS[:3], FACTS[3:])):
        file = tmp_path / f"data/forget-0000{i}-of-00002.parquet"
        pd.DataFrame(rows).to_parquet(file)
    pd.DataFrame(FACTS[:1]).to_parquet(tmp_path / "data/retain-00000-of-00001-0a1b2c.parquet")
    (tmp_path / "README.md").write_text("about")
    assert load_records("forget", str(tmp_path)) == EXPECTED
    assert load_records("forget[2:4]", str(tmp_path)) == EXPECTED[2:4]
    assert load_records("retain", str(tmp_path)) == EXPECTED[:1]
    with pytest.raises(NoSuchSplitError, match="unknown split 'train': .* has forget, retain"):
        load_records("train", str(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match="1 of the 2 files of the split 'forget': fetch"):
        load_records("forget", str(tmp_path))


def test_configurations_are_folders_of_splits(tmp_path):
    (tmp_path / "raw").mkdir()
    write_jsonl(tmp_path / "raw/forget.jsonl", FACTS[:2])
    write_jsonl(tmp_path / "raw/retain.jsonl", FACTS[2:])
    assert load_records("raw/forget", str(tmp_path)) == EXPECTED[:2]


def test_a_split_in_two_files_is_refused_until_one_is_named_whole(tmp_path):
    write_jsonl(tmp_path / "facts.jsonl", FACTS)
    (tmp_path / "facts.csv").write_text("question,answer\na,b\n")
    with pytest.raises(UserError, match="'facts' is in .*facts.csv and .*facts.jsonl"):
        load_records("facts", str(tmp_path))
    assert load_records("facts.jsonl", str(tmp_path)) == EXPECTED


def test_a_folder_of_texts_is_a_record_a_file(tmp_path):
    (tmp_path / "shelf").mkdir()
    for name in ("shelf/c", "b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"Text {name}.\r\nTwo lines.\n")
    texts = [Record((), f"Text {name}.\nTwo lines.") for name in ("a", "b", "shelf/c")]
    assert load_records(tmp_path) == texts
    assert load_records("b", str(tmp_path)) == texts[1:2]
    assert load_records(f"{tmp_path}[:1]") == texts[:1]


# ---- rows in memory ----


def test_rows_in_memory_read_like_files():
    dataset = datasets.Dataset.from_list(FACTS)
    for source in (FACTS, iter(FACTS), (dict(f) for f in FACTS), dataset,
                   dataset.with_format("pandas"), dataset.to_iterable_dataset(),
                   pd.DataFrame(FACTS), pa.Table.from_pylist(FACTS), EXPECTED):  # fmt: skip
        assert load_records(source) == EXPECTED


def test_missing_values_of_data_frames_are_empty():
    rows = [{**FACTS[0], "tools": "[]"}, {"text": "A book.", "system": None}]
    frame = pd.DataFrame(rows).convert_dtypes()
    assert frame["answer"][1] is pd.NA
    assert load_records(frame) == [EXPECTED[0], Record((), "A book.")]


def test_a_dataset_dict_is_refused_with_its_splits():
    splits = datasets.DatasetDict(
        a=datasets.Dataset.from_list(FACTS), b=datasets.Dataset.from_list(FACTS)
    )
    with pytest.raises(UserError, match="forget is a DatasetDict with the splits a, b: give one"):
        load_records(splits, role="forget")


def test_a_record_takes_messages_as_dicts():
    pairs = Record((("user", "Who?"),), "Ada.")
    assert Record([ASKED], "Ada.") == Record([["user", "Who?"]], "Ada.") == pairs
    assert hash(Record([ASKED], "Ada.", perturbed_answers=["b"])) is not None
    for messages in ("Who?", [("user",)], ["Who?"], [{"user": "Who?"}], [("user", 5)],
                     [("narrator", "Who?")], None):  # fmt: skip
        with pytest.raises(UserError, match="messages of a Record"):
            Record(messages, "Ada.")
    with pytest.raises(UserError, match="answer of a Record must be a text, got None"):
        Record([ASKED], None)
    with pytest.raises(UserError, match="alternates of a Record must be a list of texts"):
        Record([ASKED], "Ada.", alternates="Ben.")


# ---- forms ----


def test_system_and_input_are_part_of_the_prompt():
    alpaca = {
        "instruction": "Translate.",
        "input": "Hallo",
        "output": "Hello",
        "system": "Be brief.",
    }
    assert one(alpaca) == Record((("system", "Be brief."), ("user", "Translate.\nHallo")), "Hello")
    chat = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ada."}],
            "system": "Be brief."}  # fmt: skip
    assert one(chat) == Record((("system", "Be brief."), ("user", "Who?")), "Ada.")
    other = {"messages": [{"role": "system", "content": "Be long."}, ASKED, ANSWERED],
             "system": "Be brief."}  # fmt: skip
    with pytest.raises(UserError, match='"system" and the system message differ'):
        one(other)


def test_every_answer_is_a_record_with_loss_on_all():
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = {"messages": messages, "perturbed_answer": ["x"]}
    last = Record(turns[:4], "d", perturbed_answers=("x",))
    assert load_records([row]) == [last]
    assert load_records([row], loss_on="all") == [Record(turns[:2], "b"), last]
    split = {"prompt": messages[:4], "completion": messages[4:]}
    assert load_records([split], loss_on="all") == [Record(turns[:4], "d")]
    with pytest.raises(UserError, match="must be last or all, got 'first'"):
        load_records([row], loss_on="first")
    greeted = {"messages": [messages[2], *messages[1:3]]}
    assert len(load_records([greeted])) == 1
    with pytest.raises(UserError, match="message 1, an assistant's, follows no user's"):
        load_records([greeted], loss_on="all")


QA = {"question": "Who?", "answer": "Ada."}
CHAT = {"messages": [ASKED, ANSWERED]}
DROPPED = {
    "tools": ({**CHAT, "tools": [{"name": "f"}]}, '"tools" is .*, and tools are not read'),
    "tools as text": ({**CHAT, "tools": '[{"name": "f"}]'}, "tools are not read"),
    "functions": ({**CHAT, "functions": [{"name": "f"}]}, "tools are not read"),
    "tool calls": (
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        'record 1: "messages", message 2: "tool_calls" is .*tools are not read',
    ),
    "tool role": (
        {"messages": [ASKED, {"role": "tool", "content": "5"}, ANSWERED]},
        "message 2: unknown role 'tool'",
    ),
    "reasoning": ({"messages": [ASKED, {**ANSWERED, "reasoning_content": "Hm."}]}, "thoughts are"),
    "thinking": ({"messages": [ASKED, {**ANSWERED, "thinking": "Hm."}]}, "thoughts are not read"),
    "images": ({**CHAT, "images": ["a.png"]}, "only text is read"),
    "weight": ({"messages": [ASKED, {**ANSWERED, "weight": 0}]}, '"weight" is 0, .*loss_on'),
    "train": ({"messages": [ASKED, {**ANSWERED, "train": False}]}, '"train" is False'),
    "label": ({"prompt": "Who?", "completion": "Ben.", "label": False}, '"label" is False'),
    "arguments": ({**CHAT, "chat_template_kwargs": {"a": 1}}, "template_kwargs KEY=VALUE"),
    "pairs": ({"prompt": "Who?", "chosen": "Ada.", "rejected": "Ben."}, '"alternate"'),
    "context": ({**QA, "context": "Ada lives here."}, "write it into the question"),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]},
                      ANSWERED]},
        'the part .*image_url.*only {"type": "text"',
    ),
    "image beside a part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image": "u"}]},
                      ANSWERED]},
        '"content": "image" is .u., and only text is read',
    ),
    "two forms": ({**QA, **CHAT}, 'both "question"/"answer" and "messages" have content'),
    "text beside": ({**QA, "text": "Something else."}, '"text" would be dropped'),
    "input beside": ({**QA, "input": "Ada"}, '"input" would be dropped'),
    "question beside a text": ({"text": "A book.", "question": "Who?"}, '"question" would be'),
    "wrong answers of a text": ({"text": "A book.", "perturbed_answer": ["b"]}, "would be dropped"),
}  # fmt: skip


@pytest.mark.parametrize("case", DROPPED)
def test_what_would_be_dropped_is_refused(case):
    row, message = DROPPED[case]
    with pytest.raises(UserError, match=message):
        one(row)


def test_what_is_empty_or_harmless_or_repeats_the_record_is_ignored():
    expected = Record((("user", "Who?"),), "Ada.")
    empty = {"tools": None, "images": [], "reasoning": "", "chosen": float("nan"), "text": None}
    assert one({**QA, **empty, "id": 7, "source": "me", "topic": "names", "label": 3}) == expected
    assert one({**CHAT, "prompt": "Who?", "prompt_id": "x"}) == expected
    stanford = (
        "Below is an instruction.\n### Instruction:\nAdd.\n### Input:\n1, 2\n### Response:\n3"
    )
    alpaca = {"instruction": "Add.", "input": "1, 2", "output": "3", "text": stanford}
    assert one(alpaca) == Record((("user", "Add.\n1, 2"),), "3")


def test_texts_take_no_other_answers():
    text = [Record((), "A book.")]
    for call in (lambda: refused(text, ["No."], 0), lambda: alternated(text, 0)):
        with pytest.raises(UserError, match="forget record 1 is a text by itself"):
            call()


# ---- repeats ----


def test_records_in_two_sets_or_twice_in_one_are_told():
    forget, retain = EXPECTED[:4], EXPECTED[4:]
    assert not list(repeats({"forget": forget, "retain": retain}))
    shouted = Record((("system", "Be brief."), ("user", f" {forget[1].question.upper()}")),
                     forget[1].answer.replace(" ", "\u00a0"))  # fmt: skip
    (shared,) = repeats({"forget": forget, "retain": [*retain, shouted]})
    assert "1 of 4 forget records are retain records too" in shared
    assert "record 2" in shared
    (twice,) = repeats({"forget": [*forget, *forget[2:]], "retain": retain})
    assert "2 of 6 forget records repeat another one, such as record 3" in twice
    line = "A line of a book that is long enough to know it again."
    (part,) = repeats(
        {"forget": [Record((), f"One.\n{line}")], "retain": [Record((), f"{line}\nTwo.")]}
    )
    assert "1 of 1 forget records are retain records too, in whole or in part" in part
