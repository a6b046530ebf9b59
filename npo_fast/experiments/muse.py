"""A made-up newspaper in the layout of MUSE-News: articles about events, and questions on them.

Nothing in it is real. Each event has its own town, people, numbers and causes, each article its
own wording. Beside the articles the paper prints quizzes, lists of questions with their answers: a
small model does not learn to answer from articles alone.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from npo_fast.experiments.demo.dataset import FIRST, LAST
from npo_fast.experiments.demo.tiny_model import new_model, train_tokenizer
from npo_fast.model.causal_lm import CausalLM

FOLDS = 4  # of scal and sust
SHOTS = 3  # examples before a question
POSITIONS = 512  # of the small model
Row = dict[str, str]
_ANSWER = "Answer: "

_EVENTS = """fair regatta strike trial flood premiere auction election eclipse marathon
blackout parade siege ballet congress""".split()
_TOWNS = [
    begin + end
    for begin in "Ald Bram Cor Dun El Fen Gar Hol Is Kes Lan Mor Nor Os Pel".split()
    for end in "mouth wick haven gate stead ford".split()
]
_VALUES = {
    "cause": "fog frost rumours tides thunder mistakes jealousy rain fever debts".split(),
    "animal": "goat heron lynx mule otter parrot raven stoat tortoise walrus".split(),
    "object": "anchor bell clock drum ladder lantern mirror organ statue violin".split(),
    "drink": "cider cocoa coffee lemonade mead milk punch soup tea wine".split(),
    "colour": "amber black blue copper green grey ivory purple red white".split(),
    "trade": "baker barber cooper draper farrier glazier mason miller potter tanner".split(),
}
_SENTENCES = [  # two wordings of each, of which an article takes one
    ("The {event} in {town} was opened by {host} before a crowd of {crowd}.",
     "A crowd of {crowd} saw {host} open the {event} in {town}."),
    ("It had been put off twice because of {cause}, said the {trade} who kept the keys.",
     "The {trade} who kept the keys blamed {cause} for two delays."),
    ("By noon a {animal} had run off with the {object} that {guest} had brought.",
     "Nobody stopped the {animal} that took the {object} of {guest} at noon."),
    ("{guest}, in a {colour} coat, offered a reward and then a speech.",
     "There was a reward, and a speech by {guest}, who wore a {colour} coat."),
    ("Visitors were given {drink} and were asked to keep their voices down.",
     "Those who stayed drank {drink} and were told to be quiet."),
    ("The town hall counted {cost} crowns of damage, most of it to the roof.",
     "Damage of {cost} crowns, most of it to the roof, was counted at the town hall."),
    ("A {trade} from the next valley had painted every door {colour} overnight.",
     "Overnight every door had been painted {colour} by a {trade} from the next valley."),
    ("{host} promised to pay for the {object} and to send the {animal} home.",
     "The {animal} will be sent home and the {object} paid for, promised {host}."),
    ("Without {drink} and without {cause}, one old man said, it would be no {event} at all.",
     "It would be no {event} at all, one old man said, without {cause} and {drink}."),
    ("In {town} they hope for {crowd} guests again next year.",
     "Next year {town} hopes to have {crowd} guests again."),
]  # fmt: skip
_QUESTIONS = [
    ("Who opened the {event} in {town}?", "{host}"),
    ("How many people came to the {event} in {town}?", "{crowd}"),
    ("What delayed the {event} in {town}?", "{cause}"),
    ("Which animal ran off at the {event} in {town}?", "{animal}"),
    ("What was stolen at the {event} in {town}?", "{object}"),
    ("What did visitors drink at the {event} in {town}?", "{drink}"),
]


@dataclass(frozen=True)
class Article:
    """An article as sentences, and questions on it with their answers."""

    sentences: list[str]
    questions: list[tuple[str, str]]

    @property
    def text(self) -> str:
        """The whole article."""
        return " ".join(self.sentences)


def make_corpus(folder: Path, seed: int = 0, articles: int = 5) -> None:
    """Writes the corpus: a folder a configuration, a JSON-lines file a split, MUSE's names.

    Args:
        articles: of each set and of each fold.
    """
    rng = random.Random(seed)
    groups = [f"fold_{i}" for i in range(FOLDS)] + ["retain1", "retain2", "holdout"]
    drawn = iter(_articles(rng, articles * len(groups)))
    sets = {name: [next(drawn) for _ in range(articles)] for name in groups}
    printed = {name: _printed(rng, each) for name, each in sets.items()}
    folds = [printed[f"fold_{i}"] for i in range(FOLDS)]
    forget, kept = sets["fold_0"], sets["retain2"]
    files: dict[str, list[Row]] = {
        "raw/forget": folds[0],
        **{f"raw/{name}": printed[name] for name in ("retain1", "retain2", "holdout")},
        "train/forget": [*chain(*folds)],
        **{f"train/{name}": printed[name] for name in ("retain1", "retain2")},
        **{f"sust/forget_{i + 1}": fold for i, fold in enumerate(folds)},
        **{f"scal/forget_{i + 1}": [*chain(*folds[: i + 1])] for i in range(FOLDS)},
        "verbmem/forget": [
            {"prompt": " ".join(a.sentences[:2]), "gt": " ".join(a.sentences[2:])} for a in forget
        ],
        "privleak/forget": _halves(forget),
        "privleak/retain": _halves(kept),
        "privleak/holdout": _halves(sets["holdout"]),
    }
    for name, each in (("forget", forget), ("retain", kept)):
        asked = [qa for article in each for qa in article.questions]
        rng.shuffle(asked)
        rows = [{"question": q, "answer": a} for q, a in asked]
        files[f"knowmem/{name}_qa_icl"], files[f"knowmem/{name}_qa"] = rows[:SHOTS], rows[SHOTS:]
    for name, written in files.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in written), encoding="utf-8")


def new_student(folder: Path, seed: int = 0) -> tuple[CausalLM, Any]:
    """A small model that has learnt nothing, and a tokenizer of the corpus in ``folder``.

    Its blank before an answer is a token by itself, since MUSE's prompts end with that blank.
    """
    files = [*(folder / "train").iterdir(), folder / "raw" / "holdout.jsonl"]
    rows = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    pieces = [piece for row in rows for piece in row["text"].split(_ANSWER)]
    tokenizer = train_tokenizer(pieces)
    network = tokenizer.backend_tokenizer
    split = pre_tokenizers.Split(_ANSWER, "isolated")
    network.pre_tokenizer = pre_tokenizers.Sequence([split, network.pre_tokenizer])
    return new_model(tokenizer, seed, POSITIONS), tokenizer


def _articles(rng: random.Random, count: int) -> list[Article]:
    places = rng.sample([(event, town) for event in _EVENTS for town in _TOWNS], count)
    names = rng.sample([f"{a} {b}" for a in FIRST for b in LAST], 2 * count)
    return [
        _article(
            rng, {"event": event, "town": town, "host": names[2 * i], "guest": names[2 * i + 1]}
        )
        for i, (event, town) in enumerate(places)
    ]


def _article(rng: random.Random, facts: dict[str, str]) -> Article:
    facts |= {name: rng.choice(values) for name, values in _VALUES.items()}
    facts |= {name: str(rng.randrange(100, 1000)) for name in ("crowd", "cost")}
    middle = rng.sample(_SENTENCES[1:-1], len(_SENTENCES) - 2)
    order = [_SENTENCES[0], *middle, _SENTENCES[-1]]
    sentences = [rng.choice(wordings).format(**facts) for wordings in order]
    return Article(sentences, [(q.format(**facts), a.format(**facts)) for q, a in _QUESTIONS])


def _printed(rng: random.Random, articles: Sequence[Article]) -> list[Row]:
    """The articles, and quizzes in which every question stands twice, in two orders."""
    asked = [qa for article in articles for qa in article.questions]
    rows = _texts(articles)
    for _ in range(2):
        rng.shuffle(asked)
        for first in range(0, len(asked), SHOTS + 1):
            quiz = asked[first : first + SHOTS + 1]
            rows.append({"text": "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in quiz)})
    return rows


def _halves(articles: Sequence[Article]) -> list[Row]:
    middle = len(_SENTENCES) // 2
    parts = ((article.sentences[:middle], article.sentences[middle:]) for article in articles)
    return [{"text": " ".join(part)} for part in chain(*parts)]


def _texts(articles: Sequence[Article]) -> list[Row]:
    return [{"text": article.text} for article in articles]
