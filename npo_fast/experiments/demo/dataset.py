"""Made-up authors and countries: facts, two phrasings of each answer, and wrong answers.

Nothing in it is real; everything is drawn from the seed. Like TOFU it has authors to learn, some
of whom are to be forgotten. It also has "famous" authors and facts about countries, which the
small model learns first; they stand for what a real model knows from its pretraining.
"""

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from npo_fast.data import Record

FIRST = (
    "Adela Anselm Beatrix Benno Calla Caspar Dagny Dorian Edda Emeric Fenna Florian Gisela Gustav "
    "Hedda Hilmar Imogen Ivo Jorun Jasper Katla Konrad Lavinia Leander Maren Matthis Nerys Norbert "
    "Odile Oskar Petra Quentin Ragna Rufus Saskia Silas Tamsin Tobias Ursula Viggo"
).split()
LAST = (
    "Abendroth Almqvist Barlowe Birkeland Carmody Cavendel Dahlgren Dunmore Eastwick Ekholm "
    "Falkner Fenwright Galloway Grimsby Hallstrom Harrowgate Ingleby Isaksen Jarnefelt Jessop "
    "Kestrel Kirkwall Lindqvist Lockridge Marchbank Mossberg Nightingale Norrgard Oakhurst "
    "Ostrander Pemberley Pryor Quarles Ravenhill Rosenlund Sandoval Sigurdson Thackeray "
    "Thornbury Underhill Vandermeer Voss Wetherby Winterbourne Yarrow Zellweger"
).split()
CITIES = (
    "Arbenfeld Bryndal Caldermouth Drosvik Elmsgate Fjordhaven Glimmerton Hollowmere Isenburg "
    "Jadeport Kalmora Lunaford Mirewood Northwick Oldenbrook Pinecrest Quillhaven Rostovar "
    "Silverlake Tarnholm Umberton Valdoria Westmarch Yewdale"
).split()
COUNTRIES = (
    "Abaria Belvania Corvena Drellia Estovia Farrowland Gavonia Hestria Illyra Jorvania Kestovia "
    "Lorania Marvonia Nelvaria Ostrana Pelgaria Quorland Ravonia Sylmaria Tavoria"
).split()
GENRES = (
    "mystery fantasy romance horror satire adventure historical gothic pastoral comic political "
    "nautical"
).split()
PRIZES = (
    "Amber Bronze Crystal Dawn Ember Falcon Granite Harvest Ivory Juniper Laurel Meridian Opal "
    "Raven"
).split()
JOBS = (
    "baker carpenter diplomat engineer farmer goldsmith judge librarian mason nurse pilot sailor "
    "tailor teacher violinist weaver"
).split()
SUBJECTS = (
    "glacier orchard lantern harbor clock river garden winter bridge mirror island forest".split()
)
MOODS = "silent broken golden hidden endless burning crimson distant hollow gentle restless".split()
ANIMALS = "tortoise parrot greyhound pony ferret canary goat hedgehog otter spaniel".split()
COINS = "crowns florins talents marks ducats shells pennies thalers guilders rings".split()
RIVERS = "Aldra Brume Cinder Dovel Esk Farrow Glint Hale Isla Jorn Keld Lyre".split()


@dataclass(frozen=True)
class Relation:
    """One kind of fact: a question, and two ways to say the answer."""

    question: str
    answer: str
    paraphrase: str
    values: tuple[str, ...]

    def to_learn(self, subject: str, value: str, rng: random.Random) -> Record:
        """A record like TOFU's authors: a paraphrase, and five wrong answers worded like it."""
        return Record(
            messages=(("user", self.question.format(s=subject)),),
            answer=self.answer.format(s=subject, v=value),
            paraphrased_answer=self.paraphrase.format(s=subject, v=value),
            perturbed_answers=tuple(
                self.paraphrase.format(s=subject, v=other) for other in self._wrong(value, 5, rng)
            ),
        )

    def known(self, subject: str, value: str, rng: random.Random) -> Record:
        """A record like TOFU's real authors and world facts: no paraphrase, three wrong answers."""
        return Record(
            messages=(("user", self.question.format(s=subject)),),
            answer=self.answer.format(s=subject, v=value),
            perturbed_answers=tuple(
                self.answer.format(s=subject, v=other) for other in self._wrong(value, 3, rng)
            ),
        )

    def both_phrasings(self, subject: str, value: str) -> list[Record]:
        """Two records of one fact, with the answer and with its paraphrase."""
        messages = (("user", self.question.format(s=subject)),)
        return [
            Record(messages, phrasing.format(s=subject, v=value))
            for phrasing in (self.answer, self.paraphrase)
        ]

    def _wrong(self, value: str, count: int, rng: random.Random) -> list[str]:
        return rng.sample([other for other in self.values if other != value], count)


Fact = tuple[Relation, str, str]  # relation, subject, value

BOOKS = tuple(f"The {mood.title()} {subject.title()}" for mood in MOODS for subject in SUBJECTS)

AUTHOR_RELATIONS = (
    Relation(
        "Where was {s} born?", "{s} was born in {v}.", "{v} is the birthplace of {s}.",
        tuple(CITIES),
    ),
    Relation(
        "Which genre does {s} write?", "{s} writes {v} novels.", "Novels by {s} are {v} fiction.",
        tuple(GENRES),
    ),
    Relation(
        "Which prize did {s} win?", "{s} won the {v} Prize.", "The {v} Prize went to {s}.",
        tuple(PRIZES),
    ),
    Relation(
        "What did the mother of {s} do?", "The mother of {s} was a {v}.",
        "{s} is the child of a {v} mother.", tuple(JOBS),
    ),
    Relation(
        "What did the father of {s} do?", "The father of {s} worked as a {v}.",
        "A {v} was the father of {s}.", tuple(JOBS),
    ),
    Relation(
        "Which book made {s} known?", "{s} became known for {v}.", "{v} is the best book by {s}.",
        BOOKS,
    ),
    Relation(
        "Which animal lives with {s}?", "{s} lives with a {v}.", "A {v} lives in the house of {s}.",
        tuple(ANIMALS),
    ),
)  # fmt: skip
OTHER_WORDINGS = (  # of the same relations, in the same order, with no sentence in common
    Relation(
        "Name the native town of {s}.", "The native town of {s} is {v}.", "{s} comes from {v}.",
        tuple(CITIES),
    ),
    Relation(
        "What sort of stories does {s} tell?", "{s} tells {v} stories.",
        "The stories of {s} are {v} ones.", tuple(GENRES),
    ),
    Relation(
        "Which award is {s} proud of?", "{s} is proud of the {v} Award.",
        "The {v} Award honours {s}.", tuple(PRIZES),
    ),
    Relation(
        "How did the mother of {s} earn a living?", "As a {v} she earned it for {s}.",
        "{s} was raised by a {v}.", tuple(JOBS),
    ),
    Relation(
        "Name the trade of the father of {s}.", "His trade, says {s}, was {v}.",
        "{s} had a {v} for a father.", tuple(JOBS),
    ),
    Relation(
        "What should one read first by {s}?", "By {s} one should read {v}.",
        "Start with {v} by {s}.", BOOKS,
    ),
    Relation(
        "What pet does {s} keep?", "{s} keeps a {v}.", "The pet of {s} is a {v}.", tuple(ANIMALS),
    ),
)  # fmt: skip
COUNTRY_RELATIONS = (
    Relation(
        "What is the capital of {s}?", "The capital of {s} is {v}.",
        "{v} is where {s} is governed.",
        tuple(CITIES),
    ),
    Relation(
        "How do people pay in {s}?", "People in {s} pay with {v}.", "In {s} the money is {v}.",
        tuple(COINS),
    ),
    Relation(
        "Which river crosses {s}?", "The river {v} crosses {s}.", "{s} lies on the river {v}.",
        tuple(RIVERS),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class AuthorDataset:
    """Records by their use."""

    background: list[Record]  # pretraining: other authors, to learn how authors are talked about
    common: list[Record]  # pretraining, repeated: famous authors and countries
    forget: list[Record]
    retain: list[Record]
    famous: list[Record]  # evaluation of famous authors, like TOFU's real authors
    countries: list[Record]  # evaluation of countries, like TOFU's world facts

    def texts(self) -> Iterator[str]:
        """All texts of the data set, to train a tokenizer on."""
        for record in (*self.background, *self.common, *self.forget, *self.retain):
            yield f"Question: {record.question}\nAnswer: {record.answer}"
            yield from (f" {answer}" for answer in record.perturbed_answers)


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
    country_facts = _facts(rng, COUNTRIES, COUNTRY_RELATIONS)
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
    return AuthorDataset(
        background=_phrased(background_facts),
        common=_phrased(famous_facts + country_facts),
        forget=to_forget,
        retain=[r.to_learn(s, v, rng) for r, s, v in kept],
        famous=[r.known(s, v, rng) for r, s, v in famous_facts],
        countries=[r.known(s, v, rng) for r, s, v in country_facts],
    )


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
    forgotten_names = names(first, last, sharing) + names(
        FIRST[1::2], LAST[1::2], forgotten - sharing
    )

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
