"""Records that stand in a set twice, or in two sets that are meant to differ."""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from npo_fast.data.records import Record

PASSAGE = 8  # words of a line, from which it is no heading that many texts have


def repeats(sets: Mapping[str, Sequence[Record]], apart: str = "forget") -> Iterator[str]:
    """A sentence for each set that repeats records, and each that shares some with ``apart``.

    Records are the same where their messages and answers are, but for the system message, case,
    white space and Unicode form. Texts by themselves share what they have a whole line in common.
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
        if name == apart:
            continue
        others = {key for record in records for key in _keys(record)}
        shared = [
            i for i, record in enumerate(forgotten, 1) if not others.isdisjoint(_keys(record))
        ]
        if shared:
            yield (
                f"{len(shared)} of {len(forgotten)} {apart} records are {name} records too, in "
                f"whole or in part, such as record {shared[0]}: take them out of one of the sets"
            )


def _keys(record: Record) -> Iterator[tuple[str, ...]]:
    yield _key(record)
    if record.is_text:
        for line in record.answer.split("\n"):
            if len(line.split()) >= PASSAGE:
                yield (_normalised(line),)


def _key(record: Record) -> tuple[str, ...]:
    texts = [content for role, content in record.messages if role != "system"]
    return tuple(map(_normalised, (*texts, record.answer)))


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
