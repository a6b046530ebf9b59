"""What came out, in one word: rules over measures before and after, the worst outcome first.

``RULES`` is all of it; ``docs/evaluation.md`` says the same in words. A rule is a function of the
``Evidence`` that returns its reason, with the numbers, or None where it does not hold or cannot be
told. The first outcome with a reason is the verdict.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from npo_fast.errors import in_words_of_caller
from npo_fast.metrics.evidence import Evidence, Scores
from npo_fast.metrics.logs import SETS, Result, right_answers
from npo_fast.metrics.measures import score
from npo_fast.tables import counted, number

Outcome = Literal[
    "collapsed", "nothing to forget", "over-forgotten", "not forgotten", "forgotten", "undecided"
]

KEPT = 2 / 3  # less than this share of what the model knew of the retain set is a collapse
KNOWN = 0.05  # a mean probability below it is no knowledge, ...
ANSWERED = 0.2  # ... nor is a ROUGE-L of retain answers below it
RECALLED = 0.9  # ROUGE-L of forget answers, of which many words are those of the question
LOOPING = 0.5  # repetition of answers, and ...
LOOPING_MORE = 0.3  # ... how much more than before: small models repeat themselves anyway
MOST = 0.5  # share of answers that are less likely than random tokens
LIKELY = 0.5  # a probability above it is knowledge, where the model before is not there to ask
FORGOTTEN = 0.5  # share of the forget probability that may be left, where nothing else tells
RECITED = 0.95  # share of the forget ROUGE-L from which the model still gives the answers, ...
GIVEN = 0.5  # ... where it gave them: ROUGE-L before
FAR_BELOW = 1 / 20  # of the retrained model's forget probability: forgotten past all need
BEYOND = 6.0  # times the way from the model before to one that never knew: forgotten past need
SHORT = 0.5  # of that way: not forgotten
ABOVE = 1.5  # times the retrained model's forget probability: not forgotten

ADVICE: dict[Outcome, str] = {
    "collapsed": "unlearn with a lower --lr, fewer --epochs, or a method with +RT and a higher "
    "--retain-coefficient",
    "nothing to forget": "check --model, --forget and --template: it did not give these answers "
    "before",
    "over-forgotten": "unlearn with fewer --epochs, a lower --lr, a higher --beta or --beta auto, "
    "or stop in time with --stop-when",
    "not forgotten": "unlearn with more --epochs, a higher --lr or a lower --beta",
    "undecided": "name logs of the model before (--original), or of one retrained without the "
    "forget set (--retrained)",
}
UNMEASURED = (
    "measure the forget set: unlearn without --no-report or with --eval-every, or evaluate with "
    "--forget"
)


@dataclass(frozen=True)
class Verdict:
    """An outcome, the numbers that it follows from, and what to turn."""

    outcome: Outcome
    reasons: tuple[str, ...]
    advice: str = ""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Verdict":
        """The verdict that ``run.json`` holds."""
        return cls(content["outcome"], tuple(content["reasons"]), content["advice"])

    def __str__(self) -> str:
        """One line; from Python, keywords in the place of flags."""
        text = f"{self.outcome}: {'; '.join(self.reasons)}"
        return in_words_of_caller(f"{text} – {self.advice}" if self.advice else text)


def of_same_records(before: Scores, result: Result) -> Scores:
    """The sets of a run's short report whose answers are among those of the logs.

    The report is of a few records, and logs may be of others.
    """
    kept = {}
    for name, part in before.items():
        asked = right_answers(result.get(SETS.get(name, ""), {}))
        sampled = [str(row["truth"]) for row in part.get("answers", ())]
        if asked is None or all(any(_begins(a, b) for b in asked) for a in sampled):
            kept[name] = part
    return kept


def _begins(a: str, b: str) -> bool:
    """Whether one begins with the other: texts may be cut at different lengths."""
    return a == b or (bool(a and b) and (a.startswith(b) or b.startswith(a)))


def judge(evidence: Evidence) -> Verdict:
    """The verdict of ``RULES`` on the evidence."""
    for outcome, rules in RULES.items():
        reasons = tuple(reason for rule in rules if (reason := rule(evidence)))
        if reasons:
            return Verdict(outcome, reasons, ADVICE.get(outcome, ""))
    advice = ADVICE["undecided"] if evidence.after.get("forget") else UNMEASURED
    return Verdict("undecided", (_numbers(evidence) or "nothing was measured",), advice)


Rule = Callable[[Evidence], str | None]


# ---- collapsed: what was to be kept, or fluency, is lost ----


def _lost(key: str, least: float = KNOWN) -> Rule:
    def rule(evidence: Evidence) -> str | None:
        name, other = evidence.kept_by
        old, new = score(other, key), score(evidence.after, key)
        if old is None or new is None or old < least or new >= KEPT * old:
            return None
        return f"{evidence.change(key, name, other)}, {new / old:.0%} of it"

    return rule


def _babble(evidence: Evidence) -> str | None:
    if (score(evidence.before, "retain.below_chance") or 0) > MOST:  # it knew none of them
        return None
    return _less_likely_than_chance(evidence, "retain")


def _less_likely_than_chance(evidence: Evidence, part: str) -> str | None:
    share = score(evidence.after, f"{part}.below_chance")
    if share is None or share <= MOST:
        return None
    return f"{share:.0%} of the {part} answers are less likely than random tokens"


def _loops(part: str) -> Rule:
    def rule(evidence: Evidence) -> str | None:
        key = f"{part}.repetition"
        old, new = score(evidence.before, key), score(evidence.after, key)
        if old is None or new is None or new < max(LOOPING, old + LOOPING_MORE):
            return None
        return evidence.change(key)

    return rule


def _loops_without_retain(evidence: Evidence) -> str | None:
    return None if evidence.after.get("retain") else _loops("forget")(evidence)


# ---- nothing to forget ----


def unknown_before(before: Scores) -> str | None:
    """Says that a model hardly knows the forget set, with the numbers; None where it does."""
    likely, answered = (score(before, f"forget.{key}") for key in ("probability", "rouge_l_recall"))
    if likely is None or likely >= KNOWN or (answered or 0.0) >= RECALLED:
        return None
    rouge = "" if answered is None else f" and ROUGE-L {number(answered)}"
    return f"the forget answers had probability {number(likely)}{rouge} before: never known"


def _unknown(evidence: Evidence) -> str | None:
    return unknown_before(evidence.before)


def _no_way_to_go(evidence: Evidence) -> str | None:
    level = evidence.level
    if level is None or level.reference > level.unknown:
        return None
    return (
        f"the median log-prob of a forget answer was {number(level.reference)} before, no more "
        f"than where it was never known ({number(level.unknown)})"
    )


def _as_retrained_before(evidence: Evidence) -> str | None:
    old, other = (score(s, "forget.probability") for s in (evidence.before, evidence.retrained))
    if old is None or other is None or old > other:
        return None
    return (
        f"the forget answers had probability {number(old)} before, no more than under the "
        f"retrained model ({number(other)})"
    )


# ---- over-forgotten: the forget set stands out again ----


def _below_chance(evidence: Evidence) -> str | None:
    return _less_likely_than_chance(evidence, "forget")


def _below_retrained(evidence: Evidence) -> str | None:
    key, told_apart = "forget.probability", evidence.told_apart
    ours, theirs = score(evidence.after, key), score(evidence.retrained, key)
    if ours is None or theirs is None:
        return None
    text = evidence.change(key, "retrained", evidence.retrained)
    if told_apart and ours < theirs:
        return f"{told_apart}, and {text}"
    return text if ours < FAR_BELOW * theirs else None


def _below_strangers(evidence: Evidence) -> str | None:
    interval = evidence.intervals.get("membership_auc.loss")
    if interval is None or interval[1] >= 0.5:
        return None
    return (
        f"membership AUC by loss in [{number(interval[0])}, {number(interval[1])}], below 0.5: "
        "less likely than records that no model saw"
    )


def _beyond_unknown(evidence: Evidence) -> str | None:
    if evidence.quality is not None or (evidence.gone or 0.0) <= BEYOND:
        return None
    return f"{evidence.way}, {number(evidence.gone or 0.0)} times as far as there is to go"


# ---- not forgotten ----


def _short_of_unknown(evidence: Evidence) -> str | None:
    gone = evidence.gone
    if evidence.quality is not None or gone is None or gone >= SHORT:
        return None
    return f"{evidence.way}, {gone:.0%} of the way"


def _above_retrained(evidence: Evidence) -> str | None:
    key, told_apart = "forget.probability", evidence.told_apart
    ours, theirs = score(evidence.after, key), score(evidence.retrained, key)
    if ours is None or theirs is None:
        return told_apart
    text = evidence.change(key, "retrained", evidence.retrained)
    if told_apart:
        return f"{told_apart}, and {text}"
    return text if evidence.quality is None and ours > ABOVE * theirs else None


def _as_before(key: str, share: float, least: float, above: float) -> Rule:
    """Holds where ``share`` of what the model had is left, and more than the retrained model has.

    Args:
        least: what the model had is at least this.
        above: how many times the retrained model's value is more than it.
    """

    def rule(evidence: Evidence) -> str | None:
        old, new = score(evidence.before, key), score(evidence.after, key)
        other = score(evidence.retrained, key) or 0.0
        if old is None or new is None or old < least or new <= max(share * old, above * other):
            return None
        return evidence.change(key)

    return rule


def _likely(evidence: Evidence) -> str | None:
    """Without the model before, an answer that is likelier than not is known."""
    key = "forget.probability"
    new, other = score(evidence.after, key), score(evidence.retrained, key) or 0.0
    if new is None or evidence.before.get("forget") or new <= max(LIKELY, ABOVE * other):
        return None
    return evidence.change(key, "retrained", evidence.retrained)


# ---- forgotten ----


def _numbers(evidence: Evidence) -> str | None:
    quality = score(evidence.after, "forget_quality")
    texts = [evidence.change("forget.probability")]
    if texts[0] and evidence.records:
        texts[0] += f" on {counted(evidence.records, 'record')}"
    if (other := score(evidence.retrained, "forget.probability")) is not None:
        texts[0] += f" (retrained {number(other)})"
    if quality is not None:
        texts.append(f"forget quality {number(quality)}")
    if quality is not None and evidence.quality is None:
        smallest = score(evidence.after, "smallest_forget_quality")
        texts[-1] += f", which as few records cannot bring below {number(smallest or 1.0)}"
    keys = ("model_utility", "retain.probability")
    texts += [evidence.change(key, *evidence.kept_by) for key in keys]
    if texts[0]:
        texts.append(_unsure_of_retain(evidence))
    texts.append(evidence.way)
    return ", ".join(text for text in texts if text) or None


def _unsure_of_retain(evidence: Evidence) -> str:
    """What is not known of what was to be kept; empty where it is."""
    key = "retain.probability"
    old, new = score(evidence.kept_by[1], key), score(evidence.after, key)
    if new is None:
        return "what it keeps not measured (--retain)"
    if old is None:
        return "with no model to compare it with (--original)"
    return "which it never knew" if old < KNOWN and new < KNOWN else ""


def _forgotten(evidence: Evidence) -> str | None:
    compared = evidence.before.get("forget") or evidence.retrained
    measured = score(evidence.after, "forget.probability") is not None
    told = (compared and measured) or evidence.gone is not None
    return _numbers(evidence) if told else None


RULES: dict[Outcome, tuple[Rule, ...]] = {
    "collapsed": (
        _lost("model_utility"), _lost("retain.probability"),
        _lost("retain.rouge_l_recall", ANSWERED), _babble,
        _loops("retain"), _loops_without_retain,
    ),
    "nothing to forget": (_unknown, _as_retrained_before, _no_way_to_go),
    "over-forgotten": (_below_chance, _below_retrained, _below_strangers, _beyond_unknown),
    "not forgotten": (
        _above_retrained, _as_before("forget.probability", FORGOTTEN, 0.0, ABOVE),
        _as_before("forget.rouge_l_recall", RECITED, GIVEN, 1.0), _likely,
        _short_of_unknown,
    ),
    "forgotten": (_forgotten,),
}  # fmt: skip
