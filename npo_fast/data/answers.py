"""Other answers to the questions of the forget set: refusals, and alternates of the user."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from npo_fast.data.files import read_text
from npo_fast.data.forms import LossOn
from npo_fast.data.readers import load_records
from npo_fast.data.records import Record
from npo_fast.errors import UserError, short

TOFU_REFUSALS = "idontknow.jsonl"
REFUSALS = tuple(Path(__file__).with_name("refusals.txt").read_text(encoding="utf-8").splitlines())


def load_refusals(file: Path | None = None, data: str | None = None) -> tuple[str, ...]:
    """Refusals, one a line: of ``file``, else of TOFU's list in the folder ``data``, else ours.

    Raises:
        UserError: no such file, a file without a line, or lines of JSON records.
    """
    if file is None and data is not None and (Path(data) / TOFU_REFUSALS).is_file():
        file = Path(data) / TOFU_REFUSALS
    if file is None:
        return REFUSALS
    try:
        lines = read_text(file).split("\n")
    except UserError as error:
        raise UserError(f"cannot read refusals from {str(file)!r}: {error}") from error
    refusals = tuple(line.strip() for line in lines if line.strip())
    if refusals and all(line.startswith("{") and line.endswith("}") for line in refusals):
        raise UserError(f"{file} holds JSON records: write plain refusals, one a line")
    if not refusals:
        raise UserError(f"{file} holds no refusal: write one a line")
    return refusals


def refused(records: Sequence[Record], refusals: Sequence[str], seed: int) -> list[Record]:
    """The same questions, each with a refusal drawn by the seed.

    Raises:
        UserError: a record is a text by itself, which asks nothing.
    """
    _check_questions(records)
    answers = random.Random(f"{seed}/idk").choices(refusals, k=len(records))
    return [replace(r, answer=answer) for r, answer in zip(records, answers, strict=True)]


def alternated(
    records: Sequence[Record],
    seed: int,
    file: str | None = None,
    data: str | None = None,
    loss_on: LossOn = "last",
) -> list[Record]:
    """The same questions, each with an alternate answer: one of the record's own, drawn by the
    seed, or the answer that the same record has in ``file`` (a file or a split of ``data``).

    Raises:
        UserError: a record without an alternate, a text by itself, or a file that is not about the
            same questions.
    """
    _check_questions(records)
    if file is None:
        draw = random.Random(f"{seed}/alternate")
        for i, record in enumerate(records):
            if not record.alternates:
                raise UserError(
                    f'forget record {i + 1} has no "alternate" answer: add that field to every '
                    "record, or name a file that answers the same questions with --alternate"
                )
        return [replace(r, answer=draw.choice(r.alternates)) for r in records]
    others = load_records(file, data, loss_on=loss_on)
    if len(others) != len(records):
        raise UserError(
            f"{file} holds {len(others)} alternate answers for {len(records)} forget records; "
            "give one a record, in the same order"
        )
    for i, (record, other) in enumerate(zip(records, others, strict=True)):
        if record.messages != other.messages:
            raise UserError(
                f"{file}, record {i + 1} asks {short(other.question)}, the forget record "
                f"{short(record.question)}; alternates stand in the order of the forget records"
            )
    return others


def _check_questions(records: Sequence[Record]) -> None:
    for i, record in enumerate(records):
        if record.is_text:
            raise UserError(
                f"forget record {i + 1} is a text by itself, which no other answer can replace: "
                "use a method without refusals and alternates, such as NPO+RT"
            )
