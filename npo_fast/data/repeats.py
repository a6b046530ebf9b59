"""Records that stand in a set twice, or in two sets that are meant to differ."""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from npo_fast.data.records import Record
from npo_fast.errors import UserError

PASSAGE = 8  # words of a line, from which it is no heading that many texts have
LONG_WORD = 20  # letters, from which it is no word but a sentence of a script without spaces
WORDINGS = 4  # answers to one question; with more it is a prompt that many records begin with
Key = tuple[str, ...]
MARKS = " ?!.,;:…¿¡\"'“”‘’«»？！。"


def repeats(sets: Mapping[str, Sequence[Record]], apart: str = "forget") -> Iterator[str]:
    """A sentence for each set that repeats records, and each that shares some with ``apart``.

    A record repeats another where messages and answer are the same, but for the system message,
    case, white space, Unicode form and what nobody sees. Records of two sets are the same where
    they ask the same, whatever the answer; see ``shared``. Texts by themselves share what they have
    a whole line in common.
    """
    for name, records in sets.items():
        counts = Counter(map(_key, records))
        if surplus := len(records) - len(counts):
            (first, _), *_ = counts.most_common(1)
            number = next(i for i, record in enumerate(records, 1) if _key(record) == first)
            yield (
                f"{surplus} of {len(records)} {name} records repeat another one, such as record "
                f"{number}, and count that much more"
            )
    forgotten = sets.get(apart, ())
    for name, records in sets.items():
        if name != apart and (numbers := shared(forgotten, records, lines=True)):
            yield (
                f"{len(numbers)} of {len(forgotten)} {apart} records are {name} records too, in "
                f"whole or in part, such as record {numbers[0]}: take them out of one of the sets"
            )


def check_apart(forget: Sequence[Record], retain: Sequence[Record]) -> None:
    """Raises ``UserError`` where every record to forget is one to retain."""
    if forget and len(shared(forget, retain)) == len(forget):
        raise UserError(
            f"all {len(forget)} forget records are retain records too, so nothing could be "
            "forgotten: take them out of --retain"
        )


def shared(
    records: Sequence[Record], others: Sequence[Record], lines: bool = False
) -> list[int]:  # from 1
    """The numbers of the records that are among the others, by what they ask.

    Where the same is asked for many answers, such as by a prompt that all records begin with, or
    for several by both, the answer decides.

    Args:
        lines: of texts a whole line in common is enough.
    """
    present = {key for keys in keys_to_find(others, lines) for key in keys}
    found = (not present.isdisjoint(keys) for keys in keys_of(records, lines))
    return [i for i, is_among in enumerate(found, 1) if is_among]


def keys_of(records: Sequence[Record], lines: bool = False) -> list[set[Key]]:
    """What ``shared`` knows each of the records by."""
    found = []
    for key, question, answers, passages in _parts(records, lines):
        if answers == 1:
            found.append({question} | passages)
        elif 1 < answers <= WORDINGS:
            found.append({key, ("few", *question)} | passages)
        else:
            found.append({key} | passages)
    return found


def keys_to_find(records: Sequence[Record], lines: bool = False) -> list[set[Key]]:
    """For each record the keys that ``keys_of`` may have for one which is the same."""
    found = []
    for key, question, answers, passages in _parts(records, lines):
        asked = {question} if answers else set()
        few = {("few", *question)} if answers == 1 else set()
        found.append({key} | asked | few | passages)
    return found


def _parts(records: Sequence[Record], lines: bool) -> Iterator[tuple[Key, Key, int, set[Key]]]:
    """Of each record its key, its question, how many answers that has (a text: 0), its lines."""
    keys = [_key(record) for record in records]
    pairs = {(_question(key), key[-1].strip(MARKS)) for key in keys}
    answers = Counter(question for question, _ in pairs)
    for record, key in zip(records, keys, strict=True):
        question = _question(key)
        count = 0 if record.is_text else answers[question]
        yield key, question, count, _passages(record, lines)


def _passages(record: Record, lines: bool) -> set[Key]:
    """The lines of a text that are no headings."""
    if not (record.is_text and lines):
        return set()
    return {(_normalised(x),) for x in record.answer.splitlines() if _words(x) >= PASSAGE}


def _words(line: str) -> int:
    """How many words a line has; where a script sets no spaces, four letters are one."""
    return sum(1 if len(part) < LONG_WORD else len(part) // 4 for part in line.split())


def _question(key: Key) -> Key:
    """What is asked, apart from the answer, and from the marks around a sentence."""
    *asked, _ = key
    return ("asked", *(text.strip(MARKS) or text for text in asked))


def _key(record: Record) -> Key:
    texts = [content for role, content in record.messages if role != "system"]
    return tuple(map(_normalised, (*texts, record.answer)))


def _normalised(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    shown = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return " ".join(shown.split())
