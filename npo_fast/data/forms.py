"""Rows to records: every form in which data sets write a question, a conversation or a text."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from npo_fast.data.records import Record, as_list, as_messages, check_text, check_unread, is_empty
from npo_fast.errors import UserError, short

LossOn = Literal["last", "all"]
Turns = tuple[tuple[str, str], ...]
_FORMS = (  # the keys that make a form, the question's before the answer's
    ("question", "answer"),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("text",),
)
FORMS = ", ".join("/".join(f'"{key}"' for key in form) for form in _FORMS)
OTHER_TEXTS = ("paraphrased_answer", "paraphrased_question", "perturbed_answer", "alternate")
_SYSTEM = ("system", "system_prompt")
MEANT = {*(key for form in _FORMS for key in form), *OTHER_TEXTS, *_SYSTEM, "input"}


def parse_row(row: Any, where: str, loss_on: LossOn = "last") -> list[Record]:
    """The records of a row: one; with ``loss_on`` "all" one for each answer of a conversation.

    Args:
        row: a mapping in one of the forms of ``docs/data.md``.
        where: what messages of errors begin with.

    Raises:
        UserError: no form or several, or a key whose content no record has room for.
    """
    if loss_on not in get_args(LossOn):
        raise UserError(f"--loss-on must be last or all, got {loss_on!r}")
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    check_unread(row, where)
    form = _form_of(row, where)
    if form == ("text",):
        text = _text(row, "text", where)
        _check_read(row, {"text"}, (("", text),), where)
        return [Record((), text)]
    turns, prompt = _conversation(row, form, where)
    read = {*form, *OTHER_TEXTS, *_SYSTEM}
    _check_read(row, read | {"input"} if form == ("instruction", "output") else read, turns, where)
    *earlier, last = _records(turns, prompt, loss_on, where)
    others = {key: _texts(row, key, where) for key in OTHER_TEXTS}
    if any(others.values()):
        answer, question, wrong, alternates = others.values()
        for key, texts in (("paraphrased_answer", answer), ("paraphrased_question", question)):
            if len(texts) > 1:
                raise UserError(f'{where}: "{key}" must be one text, got {len(texts)}')
        paraphrases = (texts[0] if texts else None for texts in (answer, question))
        last = Record(
            last.messages, last.answer, next(paraphrases), wrong, alternates, *paraphrases
        )
    return [*earlier, last]


def _form_of(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The one form whose keys all have content; of ``text`` and another that it repeats, that."""
    forms = [form for form in _FORMS if not any(is_empty(row.get(key)) for key in form)]
    if len(forms) == 2 and forms[1] == ("text",):
        return forms[0]  # _check_read looks whether the text repeats it
    if len(forms) > 1:
        names = " and ".join("/".join(f'"{key}"' for key in form) for form in forms)
        raise UserError(f"{where}: both {names} have content; remove one of them")
    if forms:
        return forms[0]
    begun = next((form for form in _FORMS if any(key in row for key in form)), None)
    if begun is None:
        raise UserError(f"{where}: found the keys {short(sorted(map(str, row)))}, expected {FORMS}")
    return begun


def _check_read(row: Mapping[str, Any], read: set[str], turns: Turns, where: str) -> None:
    """Checks that keys of other forms only repeat what is read, such as Alpaca's ``text``."""
    contents = [content.strip() for role, content in turns if role != "system"]
    parts = [row[key] for key in read - {*OTHER_TEXTS, *_SYSTEM} if isinstance(row.get(key), str)]
    for key in row.keys() & MEANT - read:
        value = row[key]
        if is_empty(value):
            continue
        if isinstance(value, str):
            rendered = key == "text" and all(part.strip() in value for part in parts or contents)
            if rendered or value.strip() in contents:
                continue
        names = ", ".join(f'"{name}"' for name in sorted(read & row.keys()))
        raise UserError(
            f'{where}: "{key}" would be dropped, for the record is read from {names}; remove it or '
            "rename it"
        )


def _conversation(row: Mapping[str, Any], form: tuple[str, ...], where: str) -> tuple[Turns, int]:
    """All messages with the answer, and how many at the start are only read as a prompt."""
    if len(form) == 1:
        turns, prompt = _turns(row, form[0], "", where), 0
    else:
        asked = _turns(row, form[0], "user", where)
        if form == ("instruction", "output") and not is_empty(row.get("input")):
            asked = (("user", f"{asked[0][1]}\n{check_text(row['input'], f'{where}: input')}"),)
        turns, prompt = asked + _turns(row, form[1], "assistant", where), len(asked)
    for key in _SYSTEM:
        if is_empty(row.get(key)):
            continue
        system = ("system", check_text(row[key], f'{where}: "{key}"'))
        if turns[0][0] != "system":
            turns, prompt = (system, *turns), prompt + 1
        elif turns[0] != system:
            raise UserError(f'{where}: "{key}" and the system message differ; remove one of them')
    return turns, prompt


def _turns(row: Mapping[str, Any], key: str, role: str, where: str) -> Turns:
    """A list of messages, or one text as the message of ``role``."""
    if key in ("prompt", "completion", "messages", "conversations"):
        listed = as_list(row.get(key))
        if listed:
            return as_messages(listed, f'{where}: "{key}"')
        if not role:
            raise UserError(
                f'{where}: "{key}" must be a list of {{"role", "content"}}, got {short(row[key])}'
            )
    return ((role, _text(row, key, where)),)


def _records(turns: Turns, prompt: int, loss_on: LossOn, where: str) -> list[Record]:
    """A record for the last message, which must be an answer; with "all" for every answer."""
    roles = [role for role, _ in turns]
    if roles[-2:] != ["user", "assistant"]:
        raise UserError(
            f"{where}: messages must end with a user's and then an assistant's message, got roles "
            f"{short(roles)}"
        )
    first = len(turns) - 1 if loss_on == "last" else prompt
    records = []
    for i in range(first, len(turns)):
        if roles[i] != "assistant":
            continue
        if roles[i - 1 : i] != ["user"]:
            raise UserError(
                f"{where}: message {i + 1}, an assistant's, follows no user's message: it answers "
                "none; leave it out, or use --loss-on last"
            )
        if not turns[i][1].strip():
            raise UserError(f"{where}: message {i + 1}, an answer, is empty; leave it out")
        records.append(Record(turns[:i], turns[i][1]))
    return records


def _texts(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The texts of a key that may be absent, one text or a list of them."""
    value = row.get(key)
    if is_empty(value):
        return ()
    texts = [value] if isinstance(value, str) else as_list(value)
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise UserError(f'{where}: "{key}" must be a text or a list of texts, got {short(value)}')
    return tuple(check_text(text, f'{where}: "{key}"') for text in texts if text.strip())


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if key not in row:
        found = short(sorted(map(str, row)))
        raise UserError(f'{where}: the key "{key}" is missing, found {found}; expected {FORMS}')
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f'{where}: "{key}" must be a text that is not empty, got {short(value)}')
    return check_text(value, f'{where}: "{key}"')
