"""What is wrong with a command line that cannot be parsed, in one sentence."""

import dataclasses
import difflib
import typing
from collections.abc import Collection, Sequence
from typing import Any, Literal

from npo_fast.cli.fields import Option
from npo_fast.cli.subcommands import SUBCOMMANDS, options_of_verb
from npo_fast.errors import short
from npo_fast.suggestions import (
    ELSEWHERE,
    as_setting,
    flag_of,
    normal,
    options_in,
    suggestion,
)

_STRAY = "{} belongs to no option: a value follows the option that it is for"
_WORDS = {int: "a whole number", float: "a number"}


def explain(arguments: Sequence[str], options: Sequence[Option], verb: str) -> str | None:
    """Options that there are not, with those that are meant; else the first value that is wrong.

    None where it is something else.
    """
    by_name = {normal(option.flag): option for option in options}
    unknown: list[str] = []
    wrong: list[str] = []
    given: set[str] = set()
    positional = [option for option in options if option.positional]
    takes_words = any(typing.get_origin(option.kind) is tuple for option in positional)
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        option = by_name.get(name.lstrip("-").replace("-", "_"))
        if not _is_flag(word):
            if takes_words:
                continue
            option = next((each for each in positional if each.name not in given), None)
            wrong += [_STRAY.format(short(word))] if option is None else []
            wrong += [] if option is None else _wrong_value(option.name, word, option)
        elif option is None:
            unknown.append(name)
        elif option.kind is bool:
            wrong += [f"{name} takes no value, got {short(value)}"] if equals else []
        elif typing.get_origin(option.kind) is dict:
            takes_words = True  # KEY=VALUE, as many as there are
        else:
            value = value if equals else next(words, "--")
            wrong += _wrong_value(name, value, option)
        given |= {option.name} if option else set()
    if unknown:
        return _unknown(unknown, by_name, verb)
    for option in options:
        if option.default is dataclasses.MISSING and option.name not in given:
            what = option.argument if option.positional else f"{option.flag} {option.metavar}"
            wrong.append(f"npo-fast {verb} needs {what}: {option.help}")
    return wrong[0] if wrong else None


def unknown_settings(names: Sequence[str], known: Collection[str], verb: str) -> str:
    """The sentence for names in a settings file that a verb does not have."""
    return as_setting(_unknown(names, known, verb, "setting"))


def _unknown(names: Sequence[str], known: Collection[str], verb: str, what: str = "option") -> str:
    hints = {name: _hint(name, known, verb) for name in names}
    if len(hints) > 1:
        each = ", ".join(f"{name} ({hint})" if hint else name for name, hint in hints.items())
        return f"unknown {what}s: {each}"
    ((name, hint),) = hints.items()
    return f"unknown {what} {name}; {hint or f'`npo-fast {verb} --help-all` shows those there are'}"


def _hint(name: str, known: Collection[str], verb: str) -> str:
    """What is meant by an unknown name; "" where that cannot be guessed."""
    plain = normal(name)
    if plain in known:  # with the name of its group before it
        return f"did you mean {flag_of(plain)}?"
    meant = suggestion(name, known)
    translated = ELSEWHERE.get(plain, ())
    if meant not in translated:  # a guess: what another verb has by this name comes first
        owners: dict[str, list[str]] = {}
        for other in SUBCOMMANDS:
            theirs = {normal(option.flag) for option in options_of_verb(other)}
            for text in (flag_of(plain), *translated):
                if other != verb and {*options_in(text)} <= theirs and options_in(text):
                    owners.setdefault(text, []).append(other)
        for text, verbs in owners.items():
            return f"{text} is an option of npo-fast {', '.join(verbs)}"
    if meant is None or not meant.startswith("--"):
        return meant or ""
    return f"did you mean {meant}?"


def _wrong_value(name: str, value: str, option: Option) -> list[str]:
    """What is wrong with the value of an option, if anything is."""
    if value.startswith("--"):
        return [f"{name} needs a value: {option.metavar}"]
    if any(_fits(value, kind) for kind in option.kinds):
        return []
    choices = [c for kind in option.kinds if typing.get_origin(kind) is Literal
               for c in typing.get_args(kind)]  # fmt: skip
    expected = [word for kind, word in _WORDS.items() if kind in option.kinds]
    expected += [repr(choice) for choice in choices]
    near = difflib.get_close_matches(value.lower(), map(str, choices), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return [f"{name} must be {' or '.join(expected)}, got {short(value)}{hint}"]


def _fits(value: str, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in map(str, typing.get_args(kind))
    if kind is type(None):
        return value == "None"
    if kind not in _WORDS:
        return True
    try:
        kind(value)
    except ValueError:
        return False
    return True


def _is_flag(word: str) -> bool:
    return word.startswith("--") or (word[:1] == "-" and word[1:2].isalpha())
