"""Records of an evaluation: TOFU's four data sets, or those of them that the user has."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from npo_fast.data import (
    LossOn,
    Record,
    Records,
    Template,
    TokenizedExample,
    load_records,
    split_suffix,
)
from npo_fast.errors import NoSuchSplitError, UserError, named, short
from npo_fast.metrics import FORGET, HOLDOUT, REAL_AUTHORS, RETAIN, WORLD_FACTS

TOFU_SPLIT = re.compile(r"(forget|retain)\d\d")


@dataclass(frozen=True)
class TokenizedSet:
    """The records of one log as tokens: of S records, S right answers and any other answers.

    A window of a raw text is a record of its own, whose answer is the window.
    """

    records: list[Record]
    answers: list[TokenizedExample]  # S right answers
    prompts: list[list[int]]  # S, to answer; of a window the first half of it
    truths: list[str]  # S, what should follow
    following: dict[int, list[int]]  # of each window the tokens of its second half
    other_answers: list[TokenizedExample]
    """Of each record in turn the paraphrase, where it has one, and its wrong answers. Empty where
    any record has no wrong answer."""

    def first(self, count: int) -> "TokenizedSet":
        """The first ``count`` records, without other answers."""
        following = {i: ids for i, ids in self.following.items() if i < count}
        return TokenizedSet(
            self.records[:count], self.answers[:count], self.prompts[:count], self.truths[:count],
            following, [],
        )  # fmt: skip


Suite = Mapping[str, list[Record]]  # log file name -> records


def tokenize_suite(template: Template, suite: Suite) -> dict[str, TokenizedSet]:
    """Tokenises every answer of the suite once. Warns of right answers that are cut."""
    return {name: tokenize_set(template, name, records) for name, records in suite.items()}


def tokenize_set(template: Template, name: str, records: list[Record]) -> TokenizedSet:
    """Tokenises the records of the log ``name``; see ``tokenize_suite``."""
    with named(name):
        answers, truncated = template.encode_all(records)
    if truncated:
        warnings.warn(
            f"{name}: {truncated} of {len(records)} answers are cut to max_length "
            f"{template.max_length}, and measured as far as they go",
            stacklevel=3,
        )
    others: list[TokenizedExample] = []
    cut = 0
    if all(record.perturbed_answers for record in records):
        for i, record in enumerate(records):
            paraphrases = [] if record.paraphrased_answer is None else [record.paraphrased_answer]
            wordings = (*paraphrases, *record.perturbed_answers)
            with named(name):
                examples, shorter = template.encode_all(
                    [replace(record, answer=answer) for answer in wordings], f"record {i + 1}"
                )
            others += [replace(each, index=len(others) + j) for j, each in enumerate(examples)]
            cut += shorter
    if cut:
        warnings.warn(
            f"{name}: {cut} of {len(others)} paraphrased and wrong answers are cut to max_length "
            f"{template.max_length}, and so are the truth ratios with them",
            stacklevel=3,
        )
    prompts = [list(answer.input_ids[: answer.prompt_length]) for answer in answers]
    if any(record.is_text for record in records):
        records = _with_windows(template, records)
    truths = [record.answer for record in records]
    following: dict[int, list[int]] = {}
    for i, record in enumerate(records):
        if record.is_text:  # the second half of the window should follow the first
            ids, half = list(answers[i].input_ids), len(prompts[i]) + answers[i].answer_length // 2
            prompts[i], following[i] = ids[:half], ids[half:]
            truths[i] = template.tokenizer.decode(ids[half:], skip_special_tokens=True)
    return TokenizedSet(records, answers, prompts, truths, following, others)


def rows_of(template: Template, records: list[Record]) -> list[int]:
    """How many rows of its log each record has: a text one for each window."""
    return [len(template.windows(r.answer)) if r.is_text else 1 for r in records]


def _with_windows(template: Template, records: list[Record]) -> list[Record]:
    """The records, with those of its windows in the place of each raw text."""
    expanded: list[Record] = []
    for record in records:
        windows = template.windows(record.answer) if record.is_text else []
        texts = template.tokenizer.batch_decode([list(ids[start:]) for ids, start in windows])
        expanded += [replace(record, answer=text) for text in texts] or [record]
    return expanded


def tofu_suite(
    data: str | None,
    forget: Records | None,
    retain: Records | None,
    holdout: Records | None = None,
    *,
    utility: bool = True,
    loss_on: LossOn = "last",
) -> dict[str, list[Record]]:
    """Returns records by the name of the log they fill.

    ``forget`` and ``retain`` are splits, files or rows as in training. Where a split
    ``<name>_perturbed`` exists beside it (TOFU has them), that one is taken, since it has the
    paraphrased and wrong answers that the truth ratio needs. TOFU has none for ``retain90`` or
    ``forget50``: of its ``retainNN`` the records of ``retain_perturbed`` are measured, of
    ``forgetNN`` those of ``forget10_perturbed``. With ``utility``, TOFU's real authors and world
    facts are added where the data has them. Of ``holdout`` only the right answers are kept.

    Raises:
        UserError: data cannot be read, or ``<name>_perturbed`` asks other questions.
    """
    suite: dict[str, list[Record]] = {}
    if retain is not None:
        suite[RETAIN] = _with_wrong_answers(data, retain, loss_on, "retain")
    if utility and data is not None:
        for log, name in ((REAL_AUTHORS, "real_authors"), (WORLD_FACTS, "world_facts")):
            try:
                suite[log] = _with_wrong_answers(data, name, loss_on, name)
            except NoSuchSplitError:
                continue  # a data set of the user's own has no such split
    if forget is not None:
        suite[FORGET] = _with_wrong_answers(data, forget, loss_on, "forget")
    if holdout is not None:
        records = load_records(holdout, data, "holdout", loss_on)
        suite[HOLDOUT] = [Record(r.messages, r.answer) for r in records]
    for name, records in suite.items():
        _check_even(name, records)
    return suite


def _check_even(name: str, records: list[Record]) -> None:
    numbers = sorted({len(record.perturbed_answers) for record in records})
    if len(numbers) > 1 and numbers[0] == 0:
        without = sum(not record.perturbed_answers for record in records)
        warnings.warn(
            f"{name}: {without} of {len(records)} records have no wrong answers, so there is no "
            "truth ratio",
            stacklevel=3,
        )
    elif len(numbers) > 1:
        raise UserError(
            f"{name}: every record needs as many wrong answers as the others, found from "
            f"{numbers[0]} to {numbers[-1]}"
        )


def check_forget_quality(suite: Suite) -> None:
    """Checks that the forget set has truth ratios, to compare with those of a retrained model.

    Raises:
        UserError: there is no forget set, or a record of it has no wrong answers.
    """
    records = suite.get(FORGET, [])
    if without := [i for i, record in enumerate(records) if not record.perturbed_answers]:
        raise UserError(
            f"--retrained compares truth ratios, and forget record {without[0] + 1} has no wrong "
            'answers: add "perturbed_answer" to every record, or leave out --retrained'
        )
    if not records:
        raise UserError("--retrained compares truth ratios of the forget set: name --forget")


def check_rephrased(suite: Suite) -> None:
    """Checks that records have paraphrased questions, all or none of a set.

    Raises:
        UserError: a set has some, or no set has any.
    """
    without = {name: [r.rephrased is None for r in records] for name, records in suite.items()}
    for name, missing in without.items():
        if any(missing) and not all(missing):
            raise UserError(
                f"--paraphrased-questions: record {missing.index(True) + 1} of {name} has no "
                '"paraphrased_question", and others have: add it, or leave out the flag'
            )
    if all(map(all, without.values())):
        raise UserError(
            '--paraphrased-questions: no record has a "paraphrased_question": add it to the '
            "records of --forget or --retain, or leave out the flag"
        )


def _with_wrong_answers(
    data: str | None, name: Records, loss_on: LossOn, role: str
) -> list[Record]:
    if not isinstance(name, (str, Path)):
        return load_records(name, role=role, loss_on=loss_on)
    name = str(name)
    base, bracket, part = name.partition("[")
    try:
        perturbed = load_records(f"{_perturbed(base)}{bracket}{part}", data, loss_on=loss_on)
    except NoSuchSplitError:
        plain = load_records(name, data, loss_on=loss_on)
        return _within_tofu(data, base, plain) if TOFU_SPLIT.fullmatch(base) else plain
    try:
        plain = load_records(name, data, loss_on=loss_on)
    except NoSuchSplitError:  # such as TOFU's "retain", which has wrong answers alone
        plain = perturbed
    if [r.messages for r in plain] != [r.messages for r in perturbed]:
        raise UserError(
            f"{_perturbed(base)} asks other questions than {name}, or in another order: give each "
            "record the wrong answers to its own question, or rename it"
        )
    for number, (ours, theirs) in enumerate(zip(plain, perturbed, strict=True), 1):
        if ours.answer.split() != theirs.answer.split():
            raise UserError(
                f"{_perturbed(base)} has another right answer to record {number} than {name}, "
                f"{short(theirs.answer)} and not {short(ours.answer)}: give both the same, or "
                "rename it"
            )
    return perturbed


def _within_tofu(data: str | None, base: str, plain: list[Record]) -> list[Record]:
    """The records that have wrong answers in another split of TOFU; all where none has."""
    name = "retain_perturbed" if base.startswith("retain") else "forget10_perturbed"
    try:
        wrong = {(r.messages, r.answer): r for r in load_records(name, data)}
    except NoSuchSplitError:
        return plain
    keys = [(record.messages, record.answer) for record in plain]
    return [wrong[key] for key in keys if key in wrong] or plain


def _perturbed(name: str) -> str:
    stem, suffix = split_suffix(name.rstrip("/"))
    return f"{stem}_perturbed{suffix}"
