"""From a record to tokens: where the answer stands, how it ends, and what decides the rendering."""

import logging
from datetime import datetime

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from npo_fast.data import Record, Rendering, Template
from npo_fast.data.rendering import parse_template_kwargs, read_template
from npo_fast.errors import UserError
from tests.helpers import (
    CHATML,
    EMPTY_THINK,
    INSTRUCT,
    RECORD,
    TEXTS,
    TRIMMED,
    TURN,
    byte_level,
    parts_of,
    wrapped,
)

OPEN_THINK = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
TWO_ENDS = CHATML.replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add")
NO_MARKERS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
LLAMA_3 = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ 'Today: ' + date_string + '\n' }}" + CHATML
)


def sentencepiece_like(template=None):
    """Words begin with ▁, and a text with one more, as in Llama 2."""
    words = {w for text in TEXTS for w in text.replace(" ", " ▁").split(" ")} | {"▁Question:"}
    pieces = ["<unk>", "<s>", "</s>", "▁", *sorted(words), *sorted({*"".join(TEXTS), *"[]/INST"})]
    vocabulary = [(piece, -float(len(piece) < 2) * 9) for piece in dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return wrapped(tokenizer, template, "</s>", unk_token="<unk>")


ASKED = "<|im_start|>user\nWho lives in house 1?<|im_end|>\n<|im_start|>assistant\n"
CHATS = {  # template -> prompt and label
    "one turn": (CHATML, ASKED, "Ben lives.<|im_end|>"),
    "an empty think block is the prompt's": (
        EMPTY_THINK, ASKED + "<think>\n\n</think>\n\n", "Ben lives.<|im_end|>"),
    "an open think block is closed": (
        OPEN_THINK, ASKED + "<think>\n\n</think>\n\n", "Ben lives.<|im_end|>"),
    "through the first end of turn": (TWO_ENDS, ASKED, "Ben lives.<|im_end|>"),
    "blanks before the end": (
        INSTRUCT, "<s>[INST] Who lives in house 1? [/INST]", " Ben lives. </s>"),
    "no end of turn": (
        NO_MARKERS, "user: Who lives in house 1?\nassistant:", " Ben lives.</s>"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHATS)
def test_the_prompt_is_all_before_the_answer_and_the_label_all_through_its_end(case):
    template, prompt, label = CHATS[case]
    tokenizer = byte_level(template, "<|im_end|>" if "im_end" in label else "</s>")
    assert parts_of(Template(tokenizer)) == (prompt, label)


@pytest.mark.parametrize(
    "answer", ["Who lives in house 1?", "assistant", "user", "\n", " Ben", "é🙂"]
)
def test_an_answer_is_found_whatever_it_says(answer):
    prompt, label = parts_of(Template(byte_level(CHATML, "<|im_end|>")), RECORD, answer)
    assert prompt == ASKED
    assert label == f"{answer}<|im_end|>"


def test_a_template_may_trim_the_answer():
    template = Template(byte_level(TRIMMED, "<|im_end|>"))
    assert parts_of(template, RECORD, "  Ben. \n") == (ASKED, "Ben.<|im_end|>")


def test_an_answer_that_the_template_rewrites_is_refused_with_the_text():
    upper = byte_level(CHATML.replace("m.content", "(m.content | upper)"), "<|im_end|>")
    with pytest.raises(UserError, match=r"record 8: .*does not write the answer.*BEN LIVES"):
        Template(upper).encode(RECORD, 7)


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("template", [None, INSTRUCT], ids=["plain", "chat"])
def test_ids_are_those_of_the_whole_text(make, template):
    tokenizer = make(template)
    ids = list(Template(tokenizer).encode(RECORD, 0).input_ids)
    if template:
        text = "<s>[INST] Who lives in house 1? [/INST] Ben lives. </s>"
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        text = "Question: Who lives in house 1?\nAnswer: Ben lives."
        assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_an_end_that_the_tokenizer_appends_stands_behind_the_answer_alone():
    tokenizer = byte_level(post="<s> $A </s>")
    prompt, label = parts_of(Template(tokenizer))
    assert prompt == "<s>Question: Who lives in house 1?\nAnswer:"
    assert label == " Ben lives.</s>"


def test_a_tokenizer_that_tells_no_places_gives_the_same_spans():
    tokenizer = transformers.ByT5Tokenizer()
    assert not tokenizer.is_fast
    assert parts_of(Template(tokenizer)) == (
        "Question: Who lives in house 1?\nAnswer:", " Ben lives.</s>",
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    assert parts_of(Template(tokenizer)) == (ASKED, "Ben lives.</s>")


def test_a_token_of_prompt_and_answer_at_once_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "user:?assistant:Ben": 2, "x": 3}))
    glued = wrapped(tokenizer, "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}",
                    "</s>")  # fmt: skip
    with pytest.raises(UserError, match=r"record 1: .*'Ben' cannot be told from its prompt"):
        Template(glued).encode(Record((("user", "?"),), "Ben"), 0)


BROKEN = {
    "raises": "{{ raise_exception('System role not supported') }}",
    "unknown filter": "{{ messages | nosuchfilter }}",
    "bad type": "{{ messages[0].content + 1 }}",
    "says nothing": "{{ messages[0].content }}",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_template_that_fails_is_one_line_with_the_record(case):
    with pytest.raises(UserError, match=r"^record 2: the chat template") as error:
        Template(byte_level(BROKEN[case])).encode(RECORD, 1)
    assert "\n" not in str(error.value)


# ---- what decides the rendering ----


def test_a_system_prompt_stands_before_records_without_one():
    template = Template(
        byte_level(CHATML, "<|im_end|>"), rendering=Rendering(system_prompt="Be kind.")
    )
    system = "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert parts_of(template)[0] == system + ASKED
    own = Record((("system", "Be brief."), *RECORD.messages), "Ben lives.")
    assert parts_of(template, own)[0] == system.replace("kind", "brief") + ASKED
    plain = Template(byte_level(), rendering=Rendering(system_prompt="Be kind."))
    assert parts_of(plain)[0].startswith("Be kind.\nQuestion:")


def test_the_ids_of_other_tools_can_be_made():
    tokenizer = byte_level(LLAMA_3, "<|im_end|>")
    rendering = Rendering(
        system_prompt="You are a helpful assistant.",
        template_kwargs=parse_template_kwargs(["date_string=10 Apr 2025"]),
    )
    turns = [("system", rendering.system_prompt), *RECORD.messages, ("assistant", RECORD.answer)]
    theirs = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        date_string="10 Apr 2025", tokenize=True, return_dict=False,
    )  # fmt: skip
    ids = list(Template(tokenizer, rendering=rendering).encode(RECORD, 0).input_ids)
    assert ids == theirs[: len(ids)]
    assert tokenizer.decode(theirs[len(ids) :]) == "\n"


@pytest.mark.parametrize("source", [DATED, LLAMA_3])
def test_a_date_is_the_one_that_is_given(source):
    tokenizer = byte_level(source, "<|im_end|>")
    template = Template(tokenizer, rendering=Rendering(now=datetime(2025, 4, 10)))
    assert "10 Apr 2025" in parts_of(template)[0]
    assert template.description()["now"] == "2025-04-10T00:00:00"
    assert Template(byte_level(CHATML)).description()["now"] is None, "no date is written"


def test_a_template_of_the_user_takes_the_place_of_the_tokenizers(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(NO_MARKERS)
    name, source = read_template(str(file))
    template = Template(byte_level(CHATML), rendering=Rendering(name, source))
    assert parts_of(template)[0] == "user: Who lives in house 1?\nassistant:"
    with pytest.raises(UserError, match="cannot read .*nothing.jinja"):
        read_template(str(tmp_path / "nothing.jinja"))


def test_template_variables_are_json_or_text():
    pairs = ["enable_thinking=false", "date_string=10 Apr 2025", "n=3", "x=True", "y=a=b", "z="]
    assert parse_template_kwargs(pairs) == {
        "enable_thinking": False, "date_string": "10 Apr 2025", "n": 3, "x": True, "y": "a=b",
        "z": "",
    }  # fmt: skip
    with pytest.raises(UserError, match="takes KEY=VALUE, got 'thinking'"):
        parse_template_kwargs(["thinking"])
    with pytest.raises(UserError, match="cannot set messages"):
        Rendering(template_kwargs={"messages": []})


def test_a_variable_that_the_template_does_not_read_is_refused():
    rendering = Rendering(template_kwargs={"date_strin": "10 Apr 2025"})
    with pytest.raises(UserError, match="'date_strin', which .* did you mean 'date_string'"):
        Template(byte_level(LLAMA_3, "<|im_end|>"), rendering=rendering)
    with pytest.raises(UserError, match="does not read"):
        Template(byte_level(), rendering=rendering)


# ---- where answers end ----


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chat"])
def test_an_answer_that_brings_its_end_has_one(template):
    tokenizer = byte_level(template, "<|im_end|>" if template else "</s>")
    _, label = parts_of(Template(tokenizer), RECORD, f"Ben.{tokenizer.eos_token}")
    assert label.strip() == f"Ben.{tokenizer.eos_token}"


def test_stop_tokens_are_those_of_tokenizer_model_and_template():
    tokenizer = byte_level(CHATML, "</s>")
    template = Template(tokenizer, stop_ids=[4])
    assert template.stop_ids == {1, 3, 4}
    assert parts_of(template)[1] == "Ben lives.<|im_end|>"
    assert Template(tokenizer, "plain", stop_ids=[4]).stop_ids == {1, 4}


RUN_ONS = {
    "plain": (None, " Ben.\nQuestion: Who lives in house 2?\nAnswer: Ada."),
    "chat": (CHATML, "Ben.\n<|im_start|>user\nWho?"),
    "instruct": (INSTRUCT, " Ben. [INST] Who? [/INST] Ada."),
    "no markers": (NO_MARKERS, " Ben.\nuser: Who?\nassistant: Ada."),
}


@pytest.mark.parametrize("case", RUN_ONS)
def test_an_answer_that_runs_on_is_cut_and_said(case):
    source, text = RUN_ONS[case]
    tokenizer = byte_level(source)
    template, ids = Template(tokenizer), tokenizer(text)["input_ids"]
    assert template.answer_text(ids, 999) == ("Ben.", "ran on")


def test_an_answer_that_stops_or_hits_the_limit_is_told_apart():
    tokenizer = byte_level()
    ids = tokenizer(" Ben lives.")["input_ids"]
    assert Template(tokenizer).answer_text(ids, len(ids) + 1) == ("Ben lives.", "stop")
    assert Template(tokenizer).answer_text(ids, len(ids)) == ("Ben lives.", "limit")


# ---- raw text ----


@pytest.mark.parametrize("post", [None, "<s> $A", "<s> $A </s>"])
def test_every_token_of_a_raw_text_is_predicted_once(post):
    tokenizer = byte_level(CHATML, post=post)
    text = " ".join(TEXTS)
    template = Template(tokenizer, max_length=16)
    examples, truncated = template.encode_all(
        [Record((), text), RECORD.__class__((), "Ben lives.")]
    )
    assert truncated == 0
    assert [e.index for e in examples] == list(range(len(examples)))
    assert {e.prompt_length for e in examples} == {1}
    assert max(len(e.input_ids) for e in examples) == 16
    predicted = [i for e in examples[:-1] for i in e.input_ids[e.prompt_length :]]
    ids = tokenizer(text)["input_ids"]
    assert predicted == ids[1:], "the first has nothing before it"
    if post:
        assert all(e.input_ids[0] == tokenizer.bos_token_id for e in examples)


def test_a_text_with_nothing_to_predict_is_refused():
    with pytest.raises(UserError, match="record 1: a text of 1 tokens leaves none to predict"):
        Template(byte_level()).encode_all([Record((), "B")])


# ---- what templates of real models taught ----


@pytest.mark.parametrize(
    "answer", ["Ben lives. ", "Ben lives.\n", " Ben", "\n  return Ben\n", "Ben"]
)
def test_control_tokens_that_take_the_blanks_beside_them_leave_the_answer(answer):
    tokenizer = byte_level(CHATML, "<|im_end|>")
    for name in ("<|im_start|>", "<|im_end|>"):
        tokenizer.add_tokens([AddedToken(name, special=True, lstrip=True, rstrip=True)])
    example = Template(tokenizer).encode(RECORD, 0, answer)
    words = tokenizer.decode(example.input_ids[example.prompt_length :])
    assert words.split() == [*answer.split()[:-1], answer.split()[-1] + "<|im_end|>"]


SYSTEM_LAST = (  # writes the system message before the last message, if that is a user's
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last %}"
    "{{ messages[0].content + ' ' }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)


def test_a_system_message_that_a_template_asks_with_alone_is_kept():
    template = Template(byte_level(SYSTEM_LAST), rendering=Rendering(system_prompt="Be kind."))
    prompt, label = parts_of(template)
    assert prompt == "<s>[INST] Be kind. Who lives in house 1?[/INST]"
    assert label == "Ben lives.</s>"


def test_a_message_that_a_template_drops_is_refused():
    drops = CHATML.replace("%}" + TURN, "%}{% if m.role != 'system' %}" + TURN + "{% endif %}")
    template = Template(byte_level(drops, "<|im_end|>"), rendering=Rendering(system_prompt="Be."))
    with pytest.raises(UserError, match="record 1: .*drops the system message 'Be.'"):
        template.encode(RECORD, 0)
    switch = CHATML.replace("m.content", "m.content.replace('/quick', '')")
    switch = "{% if '/quick' in messages[0].content %}quick{% endif %}" + switch
    template = Template(
        byte_level(switch, "<|im_end|>"), rendering=Rendering(system_prompt="/quick")
    )
    assert parts_of(template)[0].startswith("quick<|im_start|>system\n<|im_end|>"), "it is read"


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
def test_an_end_of_turn_may_be_an_added_token_of_any_kind(special):
    tokenizer = byte_level(CHATML.replace("<|im_end|>", "[END]"))
    tokenizer.add_tokens([AddedToken("[END]", special=special)])
    template = Template(tokenizer)
    assert parts_of(template)[1] == "Ben lives.[END]"
    assert tokenizer.convert_tokens_to_ids("[END]") in template.stop_ids


def test_an_end_of_turn_that_is_no_token_ends_a_generated_answer():
    tokenizer = byte_level(CHATML.replace("<|im_end|>", "[END]"))
    template = Template(tokenizer)
    assert parts_of(template)[1] == "Ben lives.</s>"
    ids = tokenizer("Ben.[END]\n<|im_start|>user\nWho?")["input_ids"]
    assert template.answer_text(ids[: ids.index(2)], 99) == ("Ben.", "stop")


def test_the_next_turn_ends_an_answer_where_the_model_stops_at_it():
    header = "('<|im_start|>' if m.role == 'user' else '<|eot|>')"
    glm = "{% for m in messages %}{{ " + header + " + m.content }}{% endfor %}"
    tokenizer = byte_level(glm + "{% if add_generation_prompt %}<|eot|>{% endif %}")
    assert parts_of(Template(tokenizer))[1] == "Ben lives.</s>"
    assert parts_of(Template(tokenizer, stop_ids=[2]))[1] == "Ben lives.<|im_start|>"


def test_an_opening_is_found_behind_an_end_and_not_inside_a_sentence():
    llama = byte_level("{{ bos_token }}" + INSTRUCT.replace("'[INST] '", "'<s>[INST] '"))
    assert Template(llama).answer_text(llama(" Ben.\n\n[INST] Who?")["input_ids"], 99) == (
        "Ben.", "ran on",
    )  # fmt: skip
    vicuna = byte_level(
        "{% for m in messages %}{{ m.role | upper + ': ' + m.content + "
        "('</s>' if m.role == 'assistant' else ' ') }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    cut = Template(vicuna).answer_text
    assert cut(vicuna("Ben. USER: Who?")["input_ids"], 99) == ("Ben.", "ran on")
    for text in ("SUPERUSER: root", "The log says USER: root"):
        assert cut(vicuna(text)["input_ids"], 99) == (text, "stop")


def test_an_answer_that_holds_its_thoughts_is_the_answer():
    answer = "<think>\nBen, I think.\n</think>\n\nBen."
    splits = EMPTY_THINK.replace("if loop.last", "if '</think>' not in m.content and loop.last")
    assert parts_of(Template(byte_level(splits, "<|im_end|>")), RECORD, answer) == (
        ASKED, f"{answer}<|im_end|>",
    )  # fmt: skip


def test_a_template_that_asks_otherwise_is_told_once_for_all_records():
    tokenizer = byte_level(
        CHATML.replace("<|im_start|>assistant\n' }}{% endif", "[MODEL]' }}{% endif")
    )
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("npo_fast").addHandler(handler)
    try:
        records = [Record((("user", f"Who lives in house {i}?"),), "Ben.") for i in range(9)]
        Template(tokenizer).encode_all(records)
    finally:
        logging.getLogger("npo_fast").removeHandler(handler)
    assert len(warnings) == 1
    assert "asks with '[MODEL]' where it writes '<|im_start|>assistant" in warnings[0]
