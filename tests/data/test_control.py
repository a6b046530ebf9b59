"""Text from data is text: control tokens come from the template alone, with every tokenizer."""

import logging
import random
import unicodedata
from itertools import pairwise

import pytest
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from npo_fast.data import PaddedCollator, Record, Rendering, Template
from npo_fast.errors import UserError
from npo_fast.evaluation.suite import tokenize_set
from tests.helpers import (
    CHATML,
    EMPTY_THINK,
    INSTRUCT,
    TEXTS,
    TRIMMED,
    byte_level,
    parts_of,
    wrapped,
)

MARKS = ["<|im_start|>", "<|im_end|>"]
LETTERS = sorted({*"".join(TEXTS), *"▁<>|/_[]qxzs0123456789", *"imstartendunkINSTEkuq{}"})


def with_marks(tokenizer, **properties):
    tokenizer.add_tokens([AddedToken(mark, special=True, **properties) for mark in MARKS])
    return tokenizer


def bpe_with_prefix(template, normalized):
    """As Llama 2: a ▁ before the text, bytes for unknown letters, merges up to ``</s>``."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *LETTERS]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [*pairwise(("▁", "B")), *pairwise(("<", "/")), ("</", "s"), ("</s", ">")]
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [AddedToken(t, normalized=normalized) for t in ("<unk>", "<s>", "</s>")]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return with_marks(wrapped(tokenizer, template, "</s>", unk_token="<unk>"), normalized=False)


def unigram(template):
    """As T5 and XLNet: control tokens are pieces, which a text could be cut into."""
    pieces = ["<unk>", "<s>", "</s>", "<|im_end|>", *LETTERS, *"é🙂\n＜＞"]
    vocabulary = [(piece, -float(len(piece) < 2)) for piece in dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return with_marks(wrapped(tokenizer, template, "</s>", unk_token="<unk>"))


def normalizing(template):
    """Tokens are found in the normal form: ``＜|im_end|＞`` is one too."""
    tokenizer = byte_level(template, "<|im_end|>")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return with_marks(tokenizer, normalized=True)


def marks_that_are_not_special(template):
    """As DeepSeek: the tokenizer does not say that they are control tokens."""
    renamed = template.replace("'<|im_start|>'", "'<｜User｜>'").replace("<|im_end|>", "<｜end｜>")
    tokenizer = byte_level(renamed)
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<｜User｜>", "<｜end｜>", "qxz")])
    return tokenizer


def in_python(template):
    tokenizer = with_marks(transformers.ByT5Tokenizer(extra_ids=2))
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "byte level": lambda template: byte_level(template, "<|im_end|>"),
    "byte level, takes blanks": lambda template: with_marks(
        byte_level(template, "<|im_end|>"), lstrip=True, rstrip=True
    ),
    "bpe with prefix": lambda template: bpe_with_prefix(template, True),
    "bpe with prefix, not normalized": lambda template: bpe_with_prefix(template, False),
    "unigram": unigram,
    "normalizing": normalizing,
    "not special": marks_that_are_not_special,
    "in python": in_python,
}
TEMPLATES = {"chatml": CHATML, "instruct": INSTRUCT, "trims": TRIMMED, "thinks": EMPTY_THINK}
WORDS = ["Ben", " lives ", "\n", "assistant", "<|", "|>", "</", "s>", "im_end", "＜|im_end|＞",
         "é🙂", "[INST]", "qxz"]  # fmt: skip


def squeezed(text):
    return "".join(unicodedata.normalize("NFKC", text).split())


@pytest.mark.parametrize("name", ["plain", "chat"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_control_tokens_come_from_the_template_and_texts_of_them_stay_text(kind, name):
    random_ = random.Random(f"{kind} {name}")
    for source in TEMPLATES.values() if name == "chat" else [CHATML]:
        if kind == "not special" and source is INSTRUCT:
            continue  # which does not write them: they are words
        tokenizer = TOKENIZERS[kind](source)
        template = Template(tokenizer, name, 9999, rendering=Rendering(system_prompt="S</s>x"))
        control = {i for i, t in tokenizer.added_tokens_decoder.items() if str(t) != "qxz"}
        control.discard(tokenizer.unk_token_id)
        marks = [*map(str, tokenizer.added_tokens_decoder.values())]

        def text(size, marks=marks):
            words = (random_.choice(random_.choice([WORDS, marks])) for _ in range(size))
            return f"q{''.join(words)}x"

        for _ in range(8):
            turns = [(role, text(6)) for role in ("user", "assistant", "user")]
            answer = text(6)
            example = template.encode(Record(tuple(turns), answer), 0)
            neutral = template.encode(Record(tuple((r, "q") for r, _ in turns), "q"), 0)
            ids, first = list(example.input_ids), example.prompt_length
            assert [i for i in ids if i in control] == [
                i for i in neutral.input_ids if i in control
            ]
            label, prompt = (
                squeezed(tokenizer.decode(part)) for part in (ids[first:], ids[:first])
            )
            assert label.startswith(squeezed(answer))
            for content in ("S</s>x", turns[0][1], turns[-1][1]):
                assert squeezed(content) in prompt
            (window,), _ = template.encode_all([Record((), answer)])
            assert squeezed(answer)[1:-1] in squeezed(tokenizer.decode(window.input_ids))
            assert not control & {*window.input_ids[1:-1]}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_twin_gives_the_ids_of_the_tokenizer_itself(kind):
    tokenizer = TOKENIZERS[kind](CHATML)
    control = Template(tokenizer)._control
    texts = [*TEXTS, f"Ben{MARKS[1]} lives.{MARKS[0]}\n", " <think>\nqxz é🙂", f"{MARKS[1]}</s>"]
    for text in texts:
        swapped = control._either.sub(control._swapped, text)
        assert len(swapped) == len(text)
        options = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
        theirs, twins = tokenizer(text, **options), control._twin(swapped, **options)
        assert theirs["input_ids"] == twins["input_ids"]
        assert theirs.get("offset_mapping") == twins.get("offset_mapping")


def test_an_answer_with_the_text_of_an_end_is_not_cut():
    tokenizer = byte_level(CHATML, "<|im_end|>")
    record = Record((("user", "Who?"),), "Ada lives <|im_end|> in house 1")
    for template in (Template(tokenizer), Template(tokenizer, "plain")):
        label = parts_of(template, record)[1].strip()
        assert label == "Ada lives <|im_end|> in house 1<|im_end|>"
    batch = PaddedCollator(tokenizer)([{"question": "Who?", "answer": record.answer}])
    assert int((batch["labels"] == tokenizer.eos_token_id).sum()) == 1


def test_tags_of_thoughts_and_words_are_read_as_the_tokenizer_reads_them():
    tokenizer = byte_level(EMPTY_THINK, "<|im_end|>")
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>", "qxz")])
    answer = "<think>\nqxz\n</think>\n\nBen"
    source = EMPTY_THINK.replace("if loop.last", "if '</think>' not in m.content and loop.last")
    tokenizer.chat_template = source
    example = Template(tokenizer).encode(Record((("user", "qxz?"),), answer), 0)
    assert tokenizer.convert_tokens_to_ids("<think>") in example.input_ids[example.prompt_length :]
    assert example.input_ids.count(tokenizer.convert_tokens_to_ids("qxz")) == 2


@pytest.mark.parametrize("text", ["<|im_start|>user\nWho?", "Ben.<|im_end|>\n", " <s> Ben. "])
def test_a_raw_text_that_was_rendered_before_is_refused(text):
    with pytest.raises(UserError, match=r"record 1: .*begins or ends with '<.*messages"):
        Template(byte_level(CHATML)).encode_all([Record((), text)])


def test_what_a_tokenizer_cannot_write_as_text_is_refused_with_record_and_text():
    model = models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "q": 3}, unk_token="<unk>")
    tokenizer = wrapped(Tokenizer(model), "{% for m in messages %}{{ m.content }}{% endfor %}",
                        "</s>", unk_token="<unk>")  # fmt: skip
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match=r"^record 3: it holds '</s>'.*remove it"):
        Template(tokenizer, "plain").encode(Record((("user", "q </s> q"),), "q"), 2)


def test_messages_show_data_as_it_is():
    upper = byte_level(CHATML.replace("m.content", "(m.content | upper)"), "<|im_end|>")
    with pytest.raises(UserError, match=r"the answer 'Ben <\|im_end\|> lives' became"):
        Template(upper).encode(Record((("user", "Who?"),), "Ben <|im_end|> lives"), 0)
    with pytest.raises(UserError, match=r"private character U\+F8000.*remove it"):
        Template(byte_level()).encode(Record((("user", "\U000f8000"),), "Ben"), 0)


def test_what_is_taken_for_text_or_for_an_end_is_said_once():
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("npo_fast").addHandler(handler)
    try:
        template = Template(byte_level(CHATML, "<|im_end|>"))
        records = [Record((("user", "What is <s> for?"),), "Ben.<|im_end|>")] * 3
        template.encode_all(records)
    finally:
        logging.getLogger("npo_fast").removeHandler(handler)
    assert len(warnings) == 2
    assert "holds '<s>', the text of a control token: it is encoded as text" in warnings[0]
    assert "answers end with '<|im_end|>'" in warnings[1]


def test_a_generated_text_of_an_end_is_a_part_of_the_answer():
    tokenizer = byte_level(CHATML, "<|im_end|>")
    template = Template(tokenizer)
    example = template.encode(Record((("user", "Who?"),), "Ben <|im_end|> lives"), 0)
    ids = [*example.input_ids[example.prompt_length : -1]]
    assert template.answer_text(ids, 99) == ("Ben <|im_end|> lives", "stop")


def test_a_wrong_answer_that_is_refused_names_the_log_and_the_record():
    record = Record((("user", "Who?"),), "Ben.", "Ben.", ("Ada.", "\U000f8000"))
    with pytest.raises(UserError, match=r"^eval_log.json: record 1: it holds the private"):
        tokenize_set(Template(byte_level()), "eval_log.json", [record])
