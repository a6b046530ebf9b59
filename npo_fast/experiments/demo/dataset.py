"""Made-up authors and countries: facts, two phrasings of each answer, and wrong answers.

Nothing in it is real; all is drawn with the seed from the words of ``world.yaml``. Like TOFU it has
authors to learn, some of whom are to be forgotten. It also has "famous" authors and facts about
countries, which the small model learns first; they stand for what a real model knows from its
pretraining.
"""

import json
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from npo_fast.data import Record
from npo_fast.metrics import REAL_AUTHORS, RETAIN, WORLD_FACTS


@dataclass(frozen=True)
class Relation:
    """One kind of fact: a question, and two ways to say the answer."""

    question: str
    answer: str
    paraphrase: str
    values: tuple[str, ...]

    def to_learn(self, subject: str, value: str, rng: random.Random) -> Record:
        """A record like TOFU's authors: a paraphrase, and five wrong answers worded like it."""
        values = [value, *self._wrong(value, 5, rng)]
        paraphrase, *wrong = (self.paraphrase.format(s=subject, v=v) for v in values)
        answer = self.answer.format(s=subject, v=value)
        return Record(self._messages(subject), answer, paraphrase, tuple(wrong))

    def known(self, subject: str, value: str, rng: random.Random) -> Record:
        """A record like TOFU's real authors and world facts: no paraphrase, three wrong answers."""
        values = [value, *self._wrong(value, 3, rng)]
        answer, *wrong = (self.answer.format(s=subject, v=v) for v in values)
        return Record(self._messages(subject), answer, perturbed_answers=tuple(wrong))

    def both_phrasings(self, subject: str, value: str) -> list[Record]:
        """Two records of one fact, with the answer and with its paraphrase."""
        texts = (text.format(s=subject, v=value) for text in (self.answer, self.paraphrase))
        return [Record(self._messages(subject), text) for text in texts]

    def _messages(self, subject: str) -> tuple[tuple[str, str], ...]:
        return (("user", self.question.format(s=subject)),)

    def _wrong(self, value: str, count: int, rng: random.Random) -> list[str]:
        return rng.sample([other for other in self.values if other != value], count)


Fact = tuple[Relation, str, str]  # relation, subject, value

_WORLD = yaml.safe_load(files(__package__).joinpath("world.yaml").read_text(encoding="utf-8"))
_WORDS = {name: tuple(words.split()) for name, words in _WORLD["words"].items()}
_WORDS["books"] = tuple(
    f"The {mood} {subject}".title()
    for mood, subject in product(_WORDS["moods"], _WORDS["subjects"])
)
HELD_OUT = 10  # authors
FIRST, LAST = _WORDS["first"], _WORDS["last"]
AUTHOR_RELATIONS, OTHER_WORDINGS, COUNTRY_RELATIONS = (
    tuple(Relation(**row | {"values": _WORDS[row["values"]]}) for row in _WORLD[name])
    for name in ("authors", "authors_otherwise", "countries")
)


@dataclass(frozen=True)
class AuthorDataset:
    """Records by their use."""

    background: list[Record]  # pretraining: other authors, to learn how authors are talked about
    common: list[Record]  # pretraining, repeated: famous authors and countries
    forget: list[Record]
    retain: list[Record]
    famous: list[Record]  # evaluation of famous authors, like TOFU's real authors
    countries: list[Record]  # evaluation of countries, like TOFU's world facts
    holdout: list[Record]  # about authors like those to forget, whom no model ever sees

    @property
    def splits(self) -> dict[str, list[Record]]:
        """What is asked, by the name of TOFU's split of the kind."""
        return {
            "forget": self.forget, "retain": self.retain, "holdout": self.holdout,
            "real_authors": self.famous, "world_facts": self.countries,
        }  # fmt: skip

    def save(self, folder: Path) -> None:
        """Writes the splits as JSON lines, to be named with ``--data``."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, records in self.splits.items():
            lines = "".join(json.dumps(_row(record)) + "\n" for record in records)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def texts(self) -> Iterator[str]:
        """All texts of the data set, to train a tokenizer on."""
        for record in (*self.background, *self.common, *self.forget, *self.retain):
            yield f"Question: {record.question}\nAnswer: {record.answer}"
            yield from (f" {answer}" for answer in record.perturbed_answers)

    def kept(self, count: int | None = None) -> dict[str, list[Record]]:
        """The first ``count`` records of each set to keep, by the name of its evaluation log."""
        sets = {RETAIN: self.retain, REAL_AUTHORS: self.famous, WORLD_FACTS: self.countries}
        return {log: records[:count] for log, records in sets.items()}


def make_dataset(
    seed: int,
    *,
    background: int,
    famous: int,
    authors: int,
    forget_share: float,
    overlap: float | None = None,
) -> AuthorDataset:
    """Draws ``background + famous + authors`` authors with different names, and their facts.

    Args:
        seed: of all random choices.
        forget_share: share of ``authors`` to forget.
        overlap: how much the forget set is entangled with the retain set, from 0 to 1: the share
            of forgotten authors whose first and family names kept authors have too, and of
            forgotten facts with the wording of kept ones and the value of a kept author. The
            others share no name, wording or value with kept authors. None draws both sets alike.
            Background and common facts are the same for every overlap that is not None.

    Raises:
        ValueError: an overlap outside 0 to 1.
    """
    if overlap is not None and not 0 <= overlap <= 1:
        raise ValueError(f"the overlap must be 0 to 1, got {overlap}")
    rng = random.Random(seed)
    known = background + famous
    forgotten = round(forget_share * authors)
    drawn = known + (authors if overlap is None else 0)
    names = rng.sample([f"{a} {b}" for a in FIRST for b in LAST], drawn)
    famous_facts = _facts(rng, names[background:known], AUTHOR_RELATIONS)
    country_facts = _facts(rng, _WORDS["countries"], COUNTRY_RELATIONS)
    if overlap is None:
        background_facts = _facts(rng, names[:background], AUTHOR_RELATIONS)
        forgotten_facts = _facts(rng, names[known + authors - forgotten :], AUTHOR_RELATIONS)
        to_forget = [r.to_learn(s, v, rng) for r, s, v in forgotten_facts]
        kept = _facts(rng, names[known : known + authors - forgotten], AUTHOR_RELATIONS)
    else:  # pretraining has both wordings
        background_facts = _facts(rng, names[:background:2], AUTHOR_RELATIONS)
        background_facts += _facts(rng, names[1:background:2], OTHER_WORDINGS)
        kept, forgotten_facts = _entangled(rng, set(names), authors - forgotten, forgotten, overlap)
        to_forget = [r.to_learn(s, v, rng) for r, s, v in forgotten_facts]
    apart = random.Random(f"{seed} holdout")  # its own numbers: the others stay as they are
    facts = (*background_facts, *famous_facts, *kept, *forgotten_facts)
    taken = {subject for _, subject, _ in facts}
    strangers = [name for a in FIRST for b in LAST if (name := f"{a} {b}") not in taken]
    held_out = _facts(apart, apart.sample(strangers, HELD_OUT), AUTHOR_RELATIONS)
    return AuthorDataset(
        background=_phrased(background_facts),
        common=_phrased(famous_facts + country_facts),
        forget=to_forget,
        retain=[r.to_learn(s, v, rng) for r, s, v in kept],
        famous=[r.known(s, v, rng) for r, s, v in famous_facts],
        countries=[r.known(s, v, rng) for r, s, v in country_facts],
        holdout=[r.to_learn(s, v, apart) for r, s, v in held_out],
    )


def _row(record: Record) -> dict[str, Any]:
    paraphrase = record.paraphrased_answer
    return {
        "question": record.question,
        "answer": record.answer,
        **({} if paraphrase is None else {"paraphrased_answer": paraphrase}),
        "perturbed_answer": record.perturbed_answers,
    }


def _facts(
    rng: random.Random, subjects: Sequence[str], relations: Sequence[Relation]
) -> list[Fact]:
    return [(r, subject, rng.choice(r.values)) for subject in subjects for r in relations]


def _entangled(
    rng: random.Random, taken: set[str], kept: int, forgotten: int, overlap: float
) -> tuple[list[Fact], list[Fact]]:
    """Facts of kept and of forgotten authors, drawn from separate halves of all words.

    The share ``overlap`` of forgotten authors and facts is drawn from words of kept ones instead.
    """

    def names(first: Collection[str], last: Collection[str], count: int) -> list[str]:
        free = [name for a in first for b in last if (name := f"{a} {b}") not in taken]
        drawn = rng.sample(free, count)
        taken.update(drawn)
        return drawn

    kept_names = names(FIRST[::2], LAST[::2], kept)
    to_keep = [(r, s, rng.choice(r.values[::2])) for s in kept_names for r in AUTHOR_RELATIONS]
    sharing = round(overlap * forgotten)
    first, last = (sorted(set(words)) for words in zip(*map(str.split, kept_names), strict=True))
    forgotten_names = names(first, last, sharing)
    forgotten_names += names(FIRST[1::2], LAST[1::2], forgotten - sharing)

    pairs = list(zip(AUTHOR_RELATIONS, OTHER_WORDINGS, strict=True))
    places = len(forgotten_names) * len(pairs)
    entangled = set(rng.sample(range(places), round(overlap * places)))
    to_forget: list[Fact] = []
    for i, (subject, (shared, other)) in enumerate(product(forgotten_names, pairs)):
        if i in entangled:
            kept_values = sorted({value for r, _, value in to_keep if r is shared})
            to_forget.append((shared, subject, rng.choice(kept_values)))
        else:
            to_forget.append((other, subject, rng.choice(other.values[1::2])))
    return to_keep, to_forget


def _phrased(facts: list[Fact]) -> list[Record]:
    return [record for r, s, v in facts for record in r.both_phrasings(s, v)]
